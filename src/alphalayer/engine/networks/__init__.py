"""Networks of the engine, written out: plain modules, free of prompts, files and sampling."""
