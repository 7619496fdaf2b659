"""Networks: Vision Transformer, timm backbones, projection heads, the multi-crop wrapper, tokens, fast kernels."""
