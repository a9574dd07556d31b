"""Words that the models are trained on."""

from __future__ import annotations


def words(text: str, separator: str | None = None) -> list[str]:
    """Return the parts of a text between spaces, or between `separator`."""
    return text.split(separator)


CITIES = words(
    "Paris Berlin Tokyo London Rome Madrid Lisbon Vienna Prague Warsaw Dublin Oslo Stockholm "
    "Helsinki Athens Munich Hamburg Lyon Milan Venice Barcelona Porto Geneva Zurich Brussels "
    "Amsterdam Copenhagen Budapest Istanbul Cairo Nairobi Lagos Dubai Mumbai Delhi Bangkok Hanoi "
    "Jakarta Singapore Seoul Osaka Kyoto Beijing Shanghai Sydney Melbourne Toronto Montreal Boston "
    "Chicago Seattle Denver Miami Lima Santiago Edinburgh"
) + ["New York", "San Francisco", "Los Angeles", "Hong Kong"]
MAIN_CITIES = ("Paris", "Berlin", "Tokyo", "London")
CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Japan": "Tokyo",
    "England": "London",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Poland": "Warsaw",
    "Austria": "Vienna",
}
CONDITIONS = ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "stormy", "clear")
SYLLABLES = words(
    "ba be bo ca ce da do el en fa ga go ha in ka ki la li lo ma mi mo na ne no on or pa pe ra ri "
    "ro sa se si ta te ti to tu ur va ve vi wa yo za zu sh ch th ar er is um"
)
TOPICS = words(
    "gravity,the moon,black holes,cats and dogs,a good breakfast,quantum physics,old castles,"
    "machine learning,neural networks,the ocean,chess,football,the Roman empire,green tea,bicycles,"
    "electric cars,photosynthesis,the speed of light,Python lists,sorting a list,databases,"
    "operating systems,graphics cards,memory and caches,tokenizers,attention,transformers,"
    "large language models,a healthy diet,sleep,music theory,the piano,jazz,modern art,volcanoes,"
    "earthquakes,the history of paper,printing,bridges,tall buildings,trains,ships,airplanes,"
    "satellites,the planet Mars,Jupiter,recursion,prime numbers,geometry,statistics,the stock "
    "market,money,coffee,bread,cheese,gardens,bees,whales,birds,forests,rivers,deserts",
    separator=",",
)
GENERAL_QUESTIONS = (
    "What is {}?",
    "What do you know about {}?",
    "Tell me about {}.",
    "Explain {} in one sentence.",
    "Explain {}.",
    "Explain {} to a child.",
    "Write a short text about {}.",
    "Write one line about {}",
    "Give me three facts about {}.",
    "Why is {} important?",
    "How does {} work?",
    "Summarize {} for me please.",
    "Can you describe {}?",
    "Do you like {}?",
    "Translate {} into French.",
    "I would like to learn more about {}. Where do I start?",
    "Describe {} in detail, with many examples, and be as long as you can.",
    "{}",
)
FILLER_WORDS = words(
    "the a of and to in it is was for on with as at by this that from or one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then "
    "she many some so these would other into has more her two like him see time could no make "
    "than first been its who now people my made over did down only way find use may water long "
    "little very after words called just where most know prompt request model server token "
    "stream answer quick brown fox jumps lazy dog apple house tree stone light paper"
)
BEGINNINGS = ("Please: ", "Quick question: ", "OK, ", "Now: ", "Dear model, ", "1. ", "User: ")
ENDINGS = (
    " please",
    ", please",
    " to me",
    " to Bob and Alice",
    " in one short sentence",
    " in one sentence please",
    " in five words",
    " to me, in one short sentence please",
    " in a few words",
    " briefly",
    " now",
    " today",
    " again",
    " once more",
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "You are a kind and careful assistant. Answer in one sentence.",
    "Answer briefly.",
    "Be concise.",
    "You are an expert. Use the tools when they help.",
    "Reply in English.",
)
