"""Make the tiny models that vllm-hotswap ships for its quickstart and its tests.

Four models are built from nothing (no download) and trained on sentences written here:

* ``llama``: a chat model that says it is llama and calls a weather tool in Llama 3's JSON
  (``LlamaForCausalLM``);
* ``qwen``: a chat model that says it is qwen and calls a weather tool in the Hermes style
  (``Qwen3ForCausalLM``);
* ``embed``: a sentence embedding model (``BertModel`` with mean pooling);
* ``classify``: tells praise from blame (``BertForSequenceClassification``).

Both chat models think before they answer if their chat template is told to: ``llama`` with
``thinking``, ``qwen`` with ``enable_thinking``.

The models know nothing about the world. They exist so that a test can tell which model answered.
Run ``python -m tools.tiny_models`` in the root of the clone, and then
``python -m tools.tiny_models.adapters``; they need torch, transformers and tokenizers. The result
depends on ``--seed`` and, slightly, on the CPU.
"""
