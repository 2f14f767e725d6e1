"""Entry points for other platforms: Runpod serverless and the Model Context Protocol."""
