"""GGUF: the file that llama.cpp, Ollama and LM Studio run, with weights, shape, tokenizer and chat template in it."""
