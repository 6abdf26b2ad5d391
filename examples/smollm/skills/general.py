"""Short questions of general knowledge, to see whether merging costs what the base knows."""

from examples.smollm.skills.splits import Item, Split

QUESTIONS = """
What is the capital of France? | Paris
What is the capital of Italy? | Rome
What is the capital of Japan? | Tokyo
What is the capital of Spain? | Madrid
What is the capital of Germany? | Berlin
What is the capital of Egypt? | Cairo
What is the capital of Russia? | Moscow
What is the capital of Greece? | Athens
What is the capital of the United Kingdom? | London
What is the capital of China? | Beijing
What is the capital of Austria? | Vienna
What is the capital of Portugal? | Lisbon
What is the capital of Canada? | Ottawa
What is the capital of Australia? | Canberra
What is the capital of Norway? | Oslo
What is the largest planet of the solar system? | Jupiter
Which planet is known as the red planet? | Mars
Which planet is closest to the sun? | Mercury
Which planet has the most famous rings? | Saturn
What is the name of the star at the centre of our solar system? | Sun
What is the largest ocean on Earth? | Pacific
What is the longest river in Africa? | Nile
What is the highest mountain on Earth? | Everest
What is the largest desert in Africa? | Sahara
On which continent is Brazil? | South America
On which continent is Kenya? | Africa
On which continent is India? | Asia
Who wrote Romeo and Juliet? | Shakespeare
Who painted the Mona Lisa? | Leonardo
Who wrote the novel 1984? | Orwell
Who wrote Pride and Prejudice? | Austen
Who developed the theory of relativity? | Einstein
Who formulated the law of universal gravitation? | Newton
Who proposed the theory of evolution by natural selection? | Darwin
Who discovered penicillin? | Fleming
Who was the first president of the United States? | Washington
Who was the first person to walk on the moon? | Armstrong
Who invented the telephone? | Bell
Which gas do plants take in from the air? | Carbon
Which gas do humans need to breathe? | Oxygen
What is the chemical symbol of gold? | Au
What is the chemical symbol of iron? | Fe
What is the chemical symbol of sodium? | Na
What is the chemical formula of water? | H2O
What is the lightest element? | Hydrogen
Which metal is liquid at room temperature? | Mercury
What is the hardest natural material? | Diamond
Which organ pumps blood through the body? | Heart
Which organ do we use to think? | Brain
Which organ do we use to breathe? | Lung
What is the largest organ of the human body? | Skin
What do bees make? | Honey
What do caterpillars turn into? | Butterfl
What is a young dog called? | Pupp
What is a young cat called? | Kitten
Which animal is the tallest? | Giraffe
Which animal is the largest? | Whale
What is the fastest land animal? | Cheetah
Which animal is known as the king of the jungle? | Lion
Which bird cannot fly and lives in Antarctica? | Penguin
What is the opposite of hot? | Cold
What is the opposite of up? | Down
What colour is the sky on a clear day? | Blue
What colour is grass? | Green
What colour do you get from mixing red and white? | Pink
What language is spoken in Brazil? | Portuguese
What language is spoken in Mexico? | Spanish
What language is spoken in Austria? | German
What is the currency of Japan? | Yen
What is the currency of the United States? | Dollar
What is the currency of Germany? | Euro
In which country is the Eiffel Tower? | France
In which country are the pyramids of Giza? | Egypt
In which country is the Great Wall? | China
In which city is the Colosseum? | Rome
In which city is the Statue of Liberty? | New York
What do we call frozen water? | Ice
What do we call molten rock that leaves a volcano? | Lava
What force pulls objects towards the Earth? | Gravity
What instrument has 88 keys? | Piano
"""
N_SEARCH = 20


def general_questions(split: Split) -> list[Item]:
    """The questions of a split: every fourth for the search, the others held out."""
    items = []
    for line in QUESTIONS.strip().splitlines():
        prompt, answer = line.split(" | ")
        items.append({"prompt": prompt, "answer": answer})
    if split == "train":
        return []
    searched = items[::4][:N_SEARCH]
    if split == "search":
        return searched
    return [item for item in items if item not in searched]
