"""Plain prompts to which a model samples its own answers.

Those for calibration and those for evaluation are about different subjects.
"""

_SUBJECTS = """\
bread, tea, coffee, rice, cheese, apples, potatoes, salt, honey, soup,
rain, snow, wind, clouds, storms, the seasons, rivers, mountains, deserts, oceans,
trees, roses, grass, bees, cats, dogs, horses, whales, birds, spiders,
the sun, the moon, stars, gravity, electricity, magnets, sound, water, iron, glass,
bicycles, trains, cars, bridges, airplanes, ships, clocks, telephones, printing,
computers, sleep, the heart, teeth, exercise, music, painting, chess, football,
dancing, photography, schools, libraries, markets, money"""
SUBJECTS = tuple(name.strip() for name in _SUBJECTS.split(","))
FORMS = (
    "Explain {} to a ten-year-old child.",
    "What are three important facts about {}?",
    "Write a short paragraph about {}.",
    "What questions do people often ask about {}? Answer one of them.",
)
_VARIOUS = """\
What is the longest river in Europe?
Which planet is the largest in the solar system?
How many days are there in a leap year?
Who wrote the play Romeo and Juliet?
At what temperature does water freeze?
Why is the sea salty?
Why do leaves change their color in autumn?
How does a refrigerator keep food cold?
How does a vaccine protect against a disease?
What is the difference between weather and climate?
What is the difference between a virus and a bacterium?
What did people use before paper was invented?
What is the purpose of a constitution?
Describe what a typical day of a nurse is like.
What is 17 plus 26?
What is 9 times 12?
A train travels 60 miles in an hour. How far does it travel in two and a half hours?
I have 20 apples, give away 7 and buy 5 more. How many apples do I have?
What is a quarter of 200?
A shirt costs 40 dollars and is reduced by 25 percent. What does it cost now?
List the numbers from 1 to 20 that are divisible by 3.
Write a Python function that returns the sum of a list of numbers.
Write a Python function that checks whether a word reads the same backwards.
Write a Python loop that prints the numbers from 1 to 10.
What does this Python code print? print(len("hello") * 2)
Write an SQL query that returns all customers who live in Berlin.
Write a simple HTML page with a heading and a paragraph.
Explain what a variable is in a programming language.
List five things to pack for a weekend trip.
List ten animals that live in the forest.
Name five vegetables and say how each is usually prepared.
List three advantages and three disadvantages of working from home.
Give me four ideas for a birthday present for my grandmother.
Suggest a name for a small bakery and explain your choice.
How do I boil an egg?
How do I change a flat tire?
How do I plant tomatoes in a pot?
How do I write a letter of application?
How can I remove a coffee stain from a shirt?
How can I learn a new language faster?
How can I save energy at home?
Give me step-by-step instructions for making a paper boat.
Write a polite email that asks a colleague to move a meeting to Friday.
Write a short thank-you note to a neighbor who fed my fish.
Write a poem of four lines about the sea.
Write the beginning of a story about a lost key.
Write a short conversation between a customer and a shopkeeper.
Write a product description for a wooden chair.
Write a sentence that contains the words river, lamp and Tuesday.
Rewrite this sentence in a formal tone: Hey, can you send me that file?
Rewrite this sentence in the past tense: She walks to work and buys a newspaper.
Correct the mistakes in this sentence: He go to school every days.
Summarize in one sentence why reading is good for children.
Translate into Spanish: Good morning, how are you?
Give three synonyms for the word happy.
What is the opposite of generous, and how is it used in a sentence?
Is a tomato a fruit or a vegetable? Give a reason.
Sort these words alphabetically: pear, banana, orange, cherry.
Which of these does not belong: hammer, saw, pillow, screwdriver? Say why.
Classify this review as positive or negative: The food was cold and the waiter was rude.
Extract the date and the place: The concert is on 5 May in the town hall of Leeds.
Hello! What can you help me with?
I feel nervous before an exam. What can I do?
Recommend a hobby for someone who likes to be outdoors, and explain why."""
PROMPTS = (
    *(form.format(subject) for subject in SUBJECTS for form in FORMS),
    *_VARIOUS.splitlines(),
)
"""For calibration."""

_HELD_OUT = """\
Explain volcanoes to a ten-year-old child.
What are three important facts about penguins?
Write a short paragraph about chocolate.
What questions do people often ask about earthquakes? Answer one of them.
Explain coral reefs in simple words.
What are three important facts about elephants?
Write a short paragraph about theaters.
How do caves form?
What is the capital of Japan?
Which metal is liquid at room temperature?
Who painted the Mona Lisa?
How many continents are there, and what are they called?
How does a microscope work?
What is the difference between a lake and a lagoon?
What is amber, and where is it found?
What is 34 plus 48?
What is 7 times 8?
A box holds 12 pencils. How many pencils are in 5 boxes?
Write a Python function that returns the largest of three values.
Write a Python program that counts the vowels in a string.
Explain what an operating system is.
List five kinds of fabric and what they are used for.
List four kinds of hats.
Give me three ideas for a costume party.
How do I make pancakes?
How do I sharpen a kitchen knife?
How can I prepare for a job interview?
Write a polite email to a landlord about a broken heater.
Write a poem of four lines about an old house.
Write the beginning of a story about a lighthouse.
Translate into French: Where is the nearest pharmacy?
Is this message urgent? The server is down, and nobody can log in."""
EVALUATION_PROMPTS = tuple(_HELD_OUT.splitlines())
"""For evaluation."""
