"""How the graders of text read: where the final answer is (`final_answer`), and which number it says (`numerals`)."""
