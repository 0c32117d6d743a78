"""What the model is asked, in both stages; the item tokens of a picture stand where {slots} is."""

from __future__ import annotations

# Stage 1: {title} and {slots} follow; the answer begins right after the mark, without a space.
CAPTION_HEAD = (
    "You are a helpful assistant.\n"
    "Given an Amazon product's title and its image, please provide a detailed, visually grounded "
    "description of the product that would help someone decide whether to purchase it. Focus on "
    "the product's appearance, features, and any other visually informative aspects. Do not "
    "mention the product's title in your answer. This product's title is: "
)
ANSWER_MARK = "\n\nAssistant:"
# Stage 2: the conversation, then a line and the {slots} of each candidate, then RECOMMEND_MARK.
RECOMMEND_HEAD = (
    "You are an AI assistant specialized in providing personalized product recommendations based "
    "on user conversations. You are given a conversation between a user seeking recommendations "
    "(denoted by <submission>) and other users providing comments (denoted by <comment>). You are "
    "also given a set of candidate products with their IDs, titles and images formatted as "
    '"ID: title" followed by an image. Among the candidates, recommend the most relevant product '
    "to the seeker. Only reply with its ID, and don't say anything else.\n\nConversation:\n"
)
RECOMMEND_CANDIDATES = "\n\nCandidates:\n"
RECOMMEND_MARK = "\nAssistant:"
