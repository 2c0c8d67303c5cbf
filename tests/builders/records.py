"""Records of a dataset, and the chat template that the tests' tokenizer has."""

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


QUESTIONS = ["Zoë has 3 × 4 pens. How many?", "Tom pays 5 € and 2 €. How much?", "What is 9 − 2?"]


def s1_records(n: int) -> list[dict[str, str]]:
    """Make `n` records in the s1 form, with multi-byte text and lengths that differ."""
    return [
        {
            "question": QUESTIONS[i % 3] + f" ({i})",
            "deepseek_thinking_trajectory": "Let me see. " * (i % 4 + 1)
            + f"Wait, {i} → {i + 1} ✓.",
            "deepseek_attempt": f"It is {i + 1}.\nAnswer: {i + 1}",
        }
        for i in range(n)
    ]
