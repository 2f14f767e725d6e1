"""Networks of the engine as plain modules, without prompts, files and sampling."""
