"""Dump what every module of a transformers (or original LLaVA) model returns, for `tinyllava compare`.

    seen = watch(model)          # then one forward pass: model(**processor(...)), not generate()
    np.savez("theirs.npz", **seen)

Ask for attn_implementation="eager": other kinds of attention do not return their weights.
"""

NORMS = ("post_attention_layernorm", "layer_norm2")
INPUTS = ("layers.0", "o_proj", "out_proj", "down_proj", "fc2", "linear_1", "mm_projector.0", *NORMS)


def watch(model):
    """Each module's output under its name, and of some the input under the name and "<"; filled as it runs."""
    seen = {}

    def hook(name):
        def keep(_module, inputs, output):
            first, *more = output if isinstance(output, (tuple, list)) else (output,)
            values = {name: first, name + ".weights": more[0] if name.endswith("self_attn") and more else None}
            values[name + "<"] = inputs[0] if inputs and name.endswith(INPUTS) else None
            seen.update({k: v.detach().float().numpy() for k, v in values.items() if hasattr(v, "detach")})

        return keep

    for name, module in model.named_modules():
        module.register_forward_hook(hook(name))
    return seen
