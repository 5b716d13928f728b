"""HTTP for a model: OpenAI's routes, KnowLM's `/generate`, and what watches over them.

`app` joins the routes; `bodies` reads requests, `asking` makes queries of them, `answers` texts of what the engine
gives, `completions` and `chats` OpenAI's objects. `guard` and `server` keep out what would harm: neither knows a route.
`page` adds what a browser shows at `/`.
"""
