"""Text to token ids and back: SentencePiece `.model` files and Hugging Face `tokenizer.json` files behind one class.

The heavy libraries are imported when a tokenizer is loaded, so that importing this package is cheap.
"""

from jaxlm.tokenizer.backends import Encoding
from jaxlm.tokenizer.chat import MARK_BEGIN, MARK_END, ChatError, compile_chat_template
from jaxlm.tokenizer.files import find_tokenizer_files, main_file
from jaxlm.tokenizer.segments import Ids
from jaxlm.tokenizer.settings import AddedToken
from jaxlm.tokenizer.tokenizer import Tokenizer, load_tokenizer
from jaxlm.tokenizer.training import train_sentencepiece

__all__ = [
    "MARK_BEGIN",
    "MARK_END",
    "AddedToken",
    "ChatError",
    "Encoding",
    "Ids",
    "Tokenizer",
    "compile_chat_template",
    "find_tokenizer_files",
    "load_tokenizer",
    "main_file",
    "train_sentencepiece",
]
