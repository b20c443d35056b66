"""compare_with_transformers.py: are our logits those that Hugging Face computes from our checkpoint?

    .venv/bin/python tests/compare_with_transformers.py CHECKPOINT_DIR LOGITS_FILE [--tolerance 1e-4]

LOGITS_FILE is a safetensors file with int32 `tokens` [B, T] and fp32 `logits` [B, T, V]. Prints the relative error
||ours - theirs|| / ||theirs|| and exits with 1 when it is above the tolerance, with 3 when PyTorch or transformers is
not installed.
"""
import argparse
import sys
import warnings


def relative_error(checkpoint, logits_file):
    import torch
    from safetensors.torch import load_file
    from transformers import GPT2LMHeadModel

    stored = load_file(str(logits_file))
    model = GPT2LMHeadModel.from_pretrained(str(checkpoint), torch_dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(stored["tokens"].long()).logits.double()
    ours = stored["logits"].double()
    if ours.shape != theirs.shape:
        raise ValueError(f"our logits are {list(ours.shape)}, theirs {list(theirs.shape)}")
    return float((ours - theirs).norm() / theirs.norm())


def main():
    parser = argparse.ArgumentParser(description="Compares stored logits with those of transformers.")
    parser.add_argument("checkpoint", help="folder with config.json and model.safetensors")
    parser.add_argument("logits", help="safetensors file with tokens and logits")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest relative error (default: 1e-4)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    try:
        error = relative_error(arguments.checkpoint, arguments.logits)
    except ImportError as missing:
        print(f"compare_with_transformers: {missing.name or missing} is not installed", file=sys.stderr)
        return 3
    except Exception as problem:  # of the checkpoint or the file: transformers raises many kinds
        print(f"compare_with_transformers: {' '.join(str(problem).split())[:300]}", file=sys.stderr)
        return 1
    print(f"relative error {error:.3e}")
    return 0 if error <= arguments.tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
