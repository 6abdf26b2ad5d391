"""Recipes by hand for the grammar's corners: gradients, filters, slices, modules, references, dtypes, adapters."""

GRAMMAR = {
    "gradient-of-one": """
        merge_method: linear
        models: [{model: $ada, parameters: {weight: [0.7]}}, {model: $bob, parameters: {weight: 0.3}}]
        dtype: float32""",
    "gradient-of-two": """
        merge_method: linear
        models: [{model: $ada, parameters: {weight: [0, 1]}}, {model: $bob, parameters: {weight: [1, 0]}}]
        dtype: float32""",
    "gradient-longer-than-depth": """
        merge_method: linear
        models: [{model: $ada, parameters: {weight: [0, 1, 0.5, 0.2, 0.9, 0.4, 0.7]}}, {model: $bob, parameters: {weight: 0.5}}]
        dtype: float32""",
    "gradient-at-top-level": """
        merge_method: linear
        models: [{model: $ada}, {model: $bob, parameters: {weight: 0.5}}]
        parameters: {weight: [0.1, 0.9]}
        dtype: float32""",
    "gradient-in-filter": """
        merge_method: linear
        models:
          - model: $ada
            parameters: {weight: [{filter: mlp, value: [0, 1]}, {filter: q_proj, value: [1, 0, 1]}, {value: 0.5}]}
          - {model: $bob, parameters: {weight: 0.5}}
        dtype: float32""",
    "filter-first-match-wins": """
        merge_method: linear
        models:
          - model: $ada
            parameters: {weight: [{filter: proj, value: 0.9}, {filter: mlp, value: 0.1}, {filter: "*", value: 0.4}, {value: 0.2}]}
          - {model: $bob, parameters: {weight: 0.5}}
        dtype: float32""",
    "filter-falls-through": """
        merge_method: linear
        models:
          - {model: $ada, parameters: {weight: [{filter: mlp, value: 0.9}]}}
          - {model: $bob, parameters: {weight: [{filter: self_attn, value: 0.2}]}}
        parameters: {weight: 0.6}
        dtype: float32""",
    "filter-on-layer-number": """
        merge_method: linear
        models: [{model: $ada, parameters: {weight: [{filter: layers.2., value: 3}, {value: 1}]}}, {model: $bob, parameters: {weight: 1}}]
        dtype: float32""",
    "filter-on-layer-number-of-the-source": """
        merge_method: passthrough
        slices:
          - sources:
              - {model: $ada, layer_range: [2, 4], parameters: {scale: [{filter: layers.3., value: 3}, {filter: layers.0., value: 5}]}}
        dtype: float32""",
    "filter-on-layer-number-of-the-result": """
        merge_method: slerp
        base_model: $base
        slices:
          - sources: [{model: $base, layer_range: [2, 4]}, {model: $ada, layer_range: [1, 3]}]
        parameters: {t: [{filter: layers.1., value: 0.9}, {filter: layers.3., value: 0.1}, {value: 0.5}]}
        dtype: float32""",
    "filter-on-head-and-embedding": """
        merge_method: linear
        models:
          - {model: $ada, parameters: {weight: [{filter: lm_head, value: 3}, {filter: embed_tokens, value: 0}, {value: 1}]}}
          - {model: $bob, parameters: {weight: 1}}
        dtype: float32""",
    "option-by-filter": """
        merge_method: linear
        models: [{model: $ada, parameters: {weight: 0.3}}, {model: $bob, parameters: {weight: 0.4}}]
        parameters: {normalize: [{filter: mlp, value: false}, {value: true}]}
        dtype: float32""",
    "option-by-gradient": """
        merge_method: linear
        models: [{model: $ada, parameters: {weight: 0.3}}, {model: $bob, parameters: {weight: 0.4}}]
        parameters: {normalize: [true, false, true]}
        dtype: float32""",
    "option-by-gradient-of-numbers": """
        merge_method: linear
        models: [{model: $ada, parameters: {weight: 0.3}}, {model: $bob, parameters: {weight: 0.4}}]
        parameters: {normalize: [1, 0]}
        dtype: float32""",
    "gradient-of-numbers-as-text": """
        merge_method: linear
        models: [{model: $ada, parameters: {weight: [1e-1, "0.9", 1]}}, {model: $bob, parameters: {weight: 5e-1}}]
        dtype: float32""",
    "filter-without-a-list": """
        merge_method: linear
        models:
          - {model: $ada, parameters: {weight: {filter: mlp, value: [0.1, 0.9]}}}
          - {model: $bob, parameters: {weight: {value: 0.2}}}
        parameters: {weight: 0.6}
        dtype: float32""",
    "levels": """
        merge_method: task_arithmetic
        base_model: $base
        slices:
          - sources:
              - {model: $ada, layer_range: [0, 2], parameters: {weight: 0.9}}
              - {model: $bob, layer_range: [0, 2]}
              - {model: $base, layer_range: [0, 2]}
            parameters: {weight: [0.2, 0.4], lambda: 0.5}
          - sources: [{model: $ada, layer_range: [2, 4]}, {model: $bob, layer_range: [2, 4]}, {model: $base, layer_range: [2, 4]}]
        parameters: {weight: 0.7, lambda: [{filter: mlp, value: 1.5}]}
        dtype: float32""",
    "slices-restart-gradients": """
        merge_method: linear
        slices:
          - sources:
              - {model: $ada, layer_range: [0, 3], parameters: {weight: [0, 1]}}
              - {model: $bob, layer_range: [0, 3], parameters: {weight: [1, 0.5]}}
          - sources:
              - {model: $ada, layer_range: [1, 4], parameters: {weight: [1, 0]}}
              - {model: $cyd, layer_range: [1, 4], parameters: {weight: 1}}
        dtype: float32""",
    "slices-of-one-layer": """
        merge_method: linear
        slices:
          - sources:
              - {model: $ada, layer_range: [0, 1], parameters: {weight: [0.2, 1]}}
              - {model: $bob, layer_range: [0, 1], parameters: {weight: 1}}
          - sources:
              - {model: $ada, layer_range: [3, 4], parameters: {weight: [1, 0.1]}}
              - {model: $bob, layer_range: [3, 4], parameters: {weight: 1}}
        dtype: float32""",
    "slices-overlap": """
        merge_method: passthrough
        slices:
          - sources: [{model: $ada, layer_range: [0, 3]}]
          - sources: [{model: $bob, layer_range: [1, 4]}]
          - sources: [{model: $ada, layer_range: [2, 4]}]
        dtype: float32""",
    "slices-backwards": """
        merge_method: passthrough
        slices:
          - sources: [{model: $ada, layer_range: [3, 4]}]
          - sources: [{model: $ada, layer_range: [0, 1]}]
          - sources: [{model: $ada, layer_range: [0, 1]}]
        dtype: float32""",
    "slices-at-different-depths": """
        merge_method: linear
        slices:
          - sources:
              - {model: $ada, layer_range: [0, 2], parameters: {weight: 1}}
              - {model: $bob, layer_range: [2, 4], parameters: {weight: 0.5}}
        dtype: float32""",
    "slices-of-a-deeper-model": """
        merge_method: linear
        slices:
          - sources:
              - {model: $deep, layer_range: [0, 3], parameters: {weight: 1}}
              - {model: $bob, layer_range: [1, 4], parameters: {weight: 0.5}}
          - sources:
              - {model: $deep, layer_range: [3, 6], parameters: {weight: 1}}
              - {model: $ada, layer_range: [0, 3], parameters: {weight: 0.5}}
        dtype: float32""",
    "slices-base-at-another-depth": """
        merge_method: task_arithmetic
        base_model: $base
        slices:
          - sources: [{model: $ada, layer_range: [0, 2], parameters: {weight: 0.5}}, {model: $base, layer_range: [2, 4]}]
        dtype: float32""",
    "slices-base-of-their-own": """
        merge_method: task_arithmetic
        base_model: $base
        slices:
          - base_model: $cyd
            sources: [{model: $ada, layer_range: [0, 4], parameters: {weight: 0.5}}, {model: $cyd, layer_range: [0, 4]}]
        dtype: float32""",
    "slices-linear-base-unlisted": """
        merge_method: linear
        base_model: $base
        slices: [{sources: [{model: $ada, layer_range: [0, 4]}, {model: $bob, layer_range: [0, 4]}]}]
        parameters: {weight: 1}
        dtype: float32""",
    "slices-scale-filters": """
        merge_method: passthrough
        slices:
          - sources: [{model: $ada, layer_range: [0, 2]}]
          - sources:
              - model: $bob
                layer_range: [0, 4]
                parameters: {scale: [{filter: o_proj, value: [0, 1]}, {filter: down_proj, value: 0.5}, {value: 1}]}
        dtype: float32""",
    "slices-ties": """
        merge_method: ties
        base_model: $base
        slices:
          - sources:
              - {model: $base, layer_range: [0, 2]}
              - {model: $ada, layer_range: [0, 2], parameters: {weight: 1, density: [0.2, 0.9]}}
              - {model: $bob, layer_range: [0, 2], parameters: {weight: 0.5, density: 0.4}}
          - sources:
              - {model: $base, layer_range: [1, 4]}
              - {model: $cyd, layer_range: [1, 4], parameters: {weight: [1, 0.2], density: 0.5}}
        dtype: float32""",
    "slices-base-only-as-template": """
        merge_method: passthrough
        base_model: $base
        slices: [{sources: [{model: $ada, layer_range: [0, 4]}]}]
        dtype: float32""",
    "modules-models": """
        merge_method: linear
        modules: {default: {models: [{model: $ada, parameters: {weight: 1}}, {model: $bob, parameters: {weight: 3}}]}}
        dtype: float32""",
    "modules-parameters": """
        merge_method: task_arithmetic
        base_model: $base
        modules:
          default:
            models: [{model: $ada}, {model: $bob, parameters: {weight: [{filter: mlp, value: 0.9}]}}]
            parameters: {weight: [0.2, 0.8], lambda: 0.7}
        parameters: {weight: 5, lambda: 5}
        dtype: float32""",
    "modules-slices": """
        merge_method: passthrough
        modules: {default: {slices: [{sources: [{model: $ada, layer_range: [0, 3]}]}, {sources: [{model: $bob, layer_range: [2, 4]}]}]}}
        dtype: float32""",
    "reference-as-mapping": """
        merge_method: linear
        models: [{model: {model: {path: $ada}}, parameters: {weight: 1}}, {model: {model: $bob}, parameters: {weight: 3}}]
        dtype: float32""",
    "adapter": """
        merge_method: linear
        models: [{model: $base+$lora, parameters: {weight: 1}}, {model: $bob, parameters: {weight: 1}}]
        dtype: float32""",
    "adapter-on-expert-of-base": """
        merge_method: task_arithmetic
        base_model: $base
        models: [{model: $ada+$lora, parameters: {weight: 0.8}}, {model: $base+$lora, parameters: {weight: 0.3}}]
        dtype: float32""",
    "adapter-alone": """
        merge_method: passthrough
        models: [{model: $base+$lora}]
        dtype: float32""",
    "adapter-as-mapping": """
        merge_method: passthrough
        models: [{model: {model: $base, lora: $lora}}]
        dtype: float32""",
    "dtype-from-the-models": """
        merge_method: linear
        models: [{model: $ada, parameters: {weight: 1}}, {model: $bob, parameters: {weight: 3}}]""",
    "dtype-mixed": """
        merge_method: task_arithmetic
        base_model: $base
        models: [{model: $ada-bf16, parameters: {weight: 0.5}}, {model: $cyd-f16, parameters: {weight: 0.7}}]
        dtype: float32""",
    "dtype-mixed-base-half": """
        merge_method: linear
        models:
          - {model: $base-bf16, parameters: {weight: 0.5}}
          - {model: $cyd-f16, parameters: {weight: 0.7}}
          - {model: $ada, parameters: {weight: 1}}
        dtype: float32""",
    "dtype-half-slerp": """
        merge_method: slerp
        base_model: $base-bf16
        models: [{model: $base-bf16}, {model: $ada-bf16}]
        parameters: {t: [0.2, 0.8]}
        dtype: float32""",
    "dtype-out-bfloat16": """
        merge_method: linear
        models: [{model: $ada, parameters: {weight: 1}}, {model: $bob, parameters: {weight: 3}}]
        dtype: float32
        out_dtype: bfloat16""",
    "dtype-out-float16": """
        merge_method: ties
        base_model: $base
        models: [{model: $ada, parameters: {weight: 1, density: 0.5}}, {model: $bob, parameters: {weight: 3, density: 0.5}}]
        dtype: float32
        out_dtype: float16""",
    "dtype-copied-bfloat16": """
        merge_method: passthrough
        models: [{model: $ada-bf16}]
        dtype: bfloat16""",
    "qwen-tied-and-biased": """
        merge_method: ties
        base_model: $qwen-base
        models:
          - {model: $qwen-ada, parameters: {weight: 1, density: 0.5}}
          - {model: $qwen-bob, parameters: {weight: [0.5, 1], density: 0.3}}
        dtype: float32""",
    "qwen-filter-biases": """
        merge_method: linear
        models:
          - {model: $qwen-ada, parameters: {weight: [{filter: bias, value: 5}, {value: 1}]}}
          - {model: $qwen-bob, parameters: {weight: 1}}
        dtype: float32""",
    "tied-and-untied": """
        merge_method: linear
        models: [{model: $ada, parameters: {weight: 1}}, {model: $tied, parameters: {weight: 3}}]
        dtype: float32""",
    "gpt2": """
        merge_method: linear
        models:
          - {model: $gpt2-ada, parameters: {weight: [0, 1]}}
          - {model: $gpt2-bob, parameters: {weight: [{filter: attn, value: 2}, {value: 1}]}}
        dtype: float32""",
    "gpt2-stack": """
        merge_method: passthrough
        slices: [{sources: [{model: $gpt2-ada, layer_range: [0, 2]}]}, {sources: [{model: $gpt2-bob, layer_range: [1, 3]}]}]
        dtype: float32""",
    "several-documents": """
        name: first
        merge_method: linear
        models: [{model: $ada, parameters: {weight: 1}}, {model: $bob, parameters: {weight: 3}}]
        dtype: float32
        ---
        name: second
        merge_method: task_arithmetic
        base_model: $base
        models: [{model: first, parameters: {weight: 0.5}}]
        dtype: float32
        ---
        merge_method: slerp
        base_model: $cyd
        models: [{model: $cyd}, {model: second}]
        parameters: {t: 0.4}
        dtype: float32""",
}
