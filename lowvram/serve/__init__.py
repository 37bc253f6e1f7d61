"""An OpenAI-compatible server of one model: requests in, answers out, many at a time; knows no command line."""
