"""Packed folders in other engines: the plug-in for vLLM.

:mod:`ace_ext.serving.vllm_plugin` is the entry point, and the only module that imports vLLM. The others know nothing
of it: loading, cutting, stacking and multiplying are tested without it. May import ``runtime`` and the layers below.
"""
