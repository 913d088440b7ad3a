"""Engine → HTTP: the engine in a child process, an OpenAI-compatible API in front. Imports no torch or transformers."""
