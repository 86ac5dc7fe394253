"""The few things that can be said without looking at a picture."""

from __future__ import annotations

NO_PICTURE = "I cannot see a picture."
ONLY_PICTURES = "I can only tell you what is in a picture."
UNKNOWN_WORD = "I do not know that word."

GREETINGS = {
    "Hello": "Hello! Show me a picture and ask me what is in it.",
    "Hello!": "Hello! Show me a picture and ask me what is in it.",
    "Hi": "Hello! Show me a picture and ask me what is in it.",
    "Hi!": "Hello! Show me a picture and ask me what is in it.",
    "Who are you?": "I am a very small LLaVA that knows simple drawings.",
    "What are you?": "I am a very small LLaVA that knows simple drawings.",
    "What can you do?": "I can name, count and place the things in a simple drawing.",
    "Help": "I can name, count and place the things in a simple drawing.",
    "Thank you": "You are welcome.",
    "Thank you!": "You are welcome.",
    "Thanks": "You are welcome.",
}
ELSEWHERE = (
    "What is the capital of France?", "Tell me a joke.", "Who drew this?", "What time is it?",
    "How old are you?", "Write a poem.", "Write a story about a dragon.", "What is two plus two?",
    "How do I bake a cake?", "Who won the game?", "What is the weather like today?", "Where was this taken?",
    "Why is the sky blue?", "Translate this into French.", "Do you like music?",
    "What is your favorite color?", "How much does it cost?", "When was this made?",
    "What should I eat for dinner?", "Who is the president?", "Can you write code?",
    "What is the meaning of life?", "How far is the moon?", "Tell me something interesting.", "Sing a song.",
    "What is your name?", "Is it funny?", "What happens next?", "What does this mean?",
    "Is this a good picture?", "Explain how a car works.", "Why?", "How do birds fly?",
    "What is the dog thinking?", "Is the cat happy?", "What is the name of the dog?",
)  # fmt: skip
STRANGE_WORDS = tuple(
    """
submarine violinist dentist lawyer keyboard mirror sofa carpet curtain window bridge lighthouse windmill
escalator carousel stethoscope compass ladder shovel rake saw chainsaw tweezers stapler eraser calculator
abacus notebook newspaper magazine wallet passport suitcase hammock pillow blanket mattress wardrobe fridge
oven microwave kettle blender toaster teapot plate bowl napkin chopstick meteor planet galaxy comet tornado
waterfall river lake island desert glacier canyon forest meadow beach vampire zombie wizard pirate astronaut
king queen clown baby woman man person hand foot nose ear tooth brain worm jellyfish seahorse walrus moose
beaver badger weasel ferret pigeon sparrow crow ostrich pelican stork toad gecko cobra tarantula mosquito moth
beetle cricket radish spinach cabbage celery pea bean plum fig date papaya lychee noodle sushi curry soup stew
omelette sausage steak lasagna yogurt jam honey vase statue flag drone tank cannon sled skateboard surfboard
parachute zeppelin
""".split()
)
