"""See `vllm_hotswap.entrypoints.openai.multi_model_api_server`."""
