"""Short stories for children, and for each the ending to find among those of other stories."""

from __future__ import annotations

import random
from collections.abc import Sequence

from builder.proxy.demo import draw
from builder.proxy.items import Item

# An opening and its ending; few endings name the hero, so that a name alone seldom gives the ending away.
STORIES: tuple[tuple[str, str], ...] = (
    (
        (
            "Once upon a time, there was a little girl named Lily. She had a pretty red balloon. One day, the wind "
            "took the balloon up into a big tree."
        ),
        "A bird in the tree gave the balloon back to her, and she was very happy.",
    ),
    (
        (
            "Once upon a time, there was a little boy named Tom. He had a blue toy car that he loved. One day, a wheel "
            "fell off the car and Tom was sad."
        ),
        "His dad put the wheel back on, and the blue car could go fast again.",
    ),
    (
        (
            "One day, a little dog named Spot saw a big bone in the garden. The bone was stuck in the mud. Spot pulled "
            "and pulled, but it did not move."
        ),
        "His friend came to help him pull, and they shared the big bone and were happy.",
    ),
    (
        (
            'Once upon a time, there was a little bird named Tweet. She was scared to fly. "Just move your wings and '
            'try," said her mommy.'
        ),
        "The little bird moved her wings, and soon she was flying in the sky with her mommy.",
    ),
    (
        (
            "Once upon a time, there was a little girl named Sue. She did not like the dark. One night, her mom gave "
            "her a small lamp."
        ),
        "The lamp was bright, so she was not scared of the dark and she went to sleep.",
    ),
    (
        'One day, a cat named Mittens climbed up on a high roof. She could not get down. "Meow, meow," she cried.',
        "A kind man came with a ladder and took the cat down from the roof, and she was safe.",
    ),
    (
        (
            "Once upon a time, there was a boy named Ben. He made a tall tower with his blocks. His baby sister came "
            "and the tower fell down."
        ),
        "Ben was not mad, and he and his baby sister made a new tower with the blocks.",
    ),
    (
        (
            'Once upon a time, there was a big bear named Bob. He was very hungry. "Can I have some honey?" he asked '
            "the bees."
        ),
        'The bees said, "Yes," and gave the bear some honey, and he said thank you.',
    ),
    (
        (
            "One day, a girl named Sara went to the beach with her mom. She made a big sand castle. Then a wave came "
            "and took the castle away."
        ),
        "Her mom helped her make a new sand castle, and it was even bigger.",
    ),
    (
        (
            "Once upon a time, there was a little fish named Bubbles. He swam too far in the sea and got lost. He "
            "could not find his home."
        ),
        "A big whale showed the little fish the way, and he swam home to his family.",
    ),
    (
        (
            "One day, a boy named Tim found a small puppy in the rain. The puppy was cold and wet. Tim took the puppy "
            "to his house."
        ),
        "He dried the puppy with a soft towel, and the puppy licked his face.",
    ),
    (
        (
            "Once upon a time, there was a little girl named Anna. She wanted to ride her new bike. She fell down and "
            "hurt her knee."
        ),
        "Her dad kissed her knee and held the bike, and then she could ride it.",
    ),
    (
        (
            "Once upon a time, there was a little bunny named Fluffy. He loved to eat carrots. One day, he saw a "
            "hungry mouse who had no food."
        ),
        "The bunny gave the mouse a carrot, and they ate together and became friends.",
    ),
    (
        (
            "One day, a boy named Max and his grandma made cookies. The cookies smelled so good. Max wanted to eat "
            "one, but they were too hot."
        ),
        "He waited until the cookies were not hot, and then he ate them with his grandma.",
    ),
    (
        (
            "Once upon a time, there was a little duck named Quacky. She was all alone on the lake. She wanted a "
            "friend to swim with."
        ),
        "A white swan came to the lake, and they swam together all day.",
    ),
    (
        (
            "Once upon a time, there was a girl named Lucy. She had a doll with a pretty dress. One day, the dress got "
            "a big hole."
        ),
        "Her grandma fixed the dress, and the doll looked pretty again.",
    ),
    (
        (
            "One day, a little frog named Hoppy wanted to jump over a log. The log was very big. He jumped, but he "
            "fell down."
        ),
        "The little frog tried again and again, and at last he jumped over the log.",
    ),
    (
        (
            "Once upon a time, there was a boy named Jack. He did not want to share his toy train. His friend was sad "
            "and wanted to go home."
        ),
        "Jack said sorry and shared the train, and they played with it together.",
    ),
    (
        (
            "Once upon a time, there was a snowman named Frosty. He stood in the snow and he was cold. A little girl "
            "saw that he had no hat."
        ),
        "She put a warm hat on the snowman, and he had a big smile.",
    ),
    (
        (
            "One day, a girl named Amy went to the store with her mom. There were many people and she got lost. She "
            "started to cry."
        ),
        "Then she saw her mom in the store, and her mom gave her a big hug.",
    ),
    (
        (
            "Once upon a time, there was a little elephant named Ellie. It was very hot and she was thirsty. She could "
            "not find any water."
        ),
        "Her friend the monkey took the elephant to a river, and she drank a lot of water.",
    ),
    (
        (
            "Once upon a time, there was a boy named Sam. He had a loose tooth. One day, he bit a red apple and the "
            "tooth came out."
        ),
        "He put the tooth under his pillow, and in the morning he found a shiny coin.",
    ),
    (
        'One day, a little pig named Pinky played in the mud. She got very dirty. "You need a bath!" said her mom.',
        "The little pig jumped into the bath with lots of soap, and then she was clean.",
    ),
    (
        (
            "Once upon a time, there was a girl named Emma. She planted a small seed in the garden. She gave it water "
            "every day."
        ),
        "Soon a pretty yellow flower grew from the seed, and she was so proud.",
    ),
    (
        "Once upon a time, there was a lion named Leo. He had a sharp thorn in his paw. It hurt a lot, and he cried.",
        "A small mouse pulled the thorn out of his paw, and the lion felt better.",
    ),
    (
        "One day, a boy named Billy was sick in bed. His head was hot and he felt bad. His mom made him some soup.",
        "He ate all the warm soup and slept, and the next day he was not sick.",
    ),
    (
        (
            'Once upon a time, there was a little train named Choo. He had to go up a big hill. "I can not do it," he '
            "said."
        ),
        "The little train tried very hard, and at last he was on top of the hill.",
    ),
    (
        (
            "Once upon a time, there was a girl named Jane. She liked to draw. One day, she drew a picture of her "
            "family for her mom."
        ),
        "Her mom loved the picture and put it on the wall for all to see.",
    ),
    (
        "One day, a boy named Joe went fishing with his dad. He waited a long time. Then he felt a big pull!",
        "He caught a big fish with his dad, and then they let it go back in the water.",
    ),
    (
        (
            "Once upon a time, there was a cow named Daisy. She lived on a farm. One day, the gate was open and she "
            "walked away."
        ),
        "The farmer found the cow and took her back to the farm, and he closed the gate.",
    ),
    (
        (
            "Once upon a time, there was a boy named Danny. He had a new kite. He wanted to fly the kite, but there "
            "was no wind."
        ),
        "Then the wind came, and the kite went up high in the sky.",
    ),
    (
        (
            'One day, a little girl named Rose broke a vase. She was scared, but she wanted to tell the truth. "Mom, I '
            'broke it," she said.'
        ),
        "Her mom was not mad about the vase and said she was glad to hear the truth.",
    ),
    (
        "Once upon a time, there was a little bee named Buzzy. She looked for a flower all day. She was tired and sad.",
        "At last the bee found a garden with many flowers, and she was so happy.",
    ),
    (
        (
            'Once upon a time, there was a boy named Peter. He was scared of the big slide at the park. "I will hold '
            'your hand," said his friend.'
        ),
        "They went down the big slide together, and it was so much fun that they did it again.",
    ),
    (
        "One day, a hen named Penny sat on her egg. She sat and sat and kept it warm. Then she heard a little noise.",
        "The egg cracked open, and a cute little chick came out and said peep.",
    ),
    (
        (
            "Once upon a time, there was a girl named Molly. It was her birthday, and she had a big cake. She wanted "
            "to make a wish."
        ),
        "She blew out all the candles on the cake, and everyone sang a happy song.",
    ),
    (
        (
            'Once upon a time, there was a turtle named Shelly. She was very slow. "Let us have a race!" said a fast '
            "rabbit."
        ),
        "The rabbit took a nap, so the slow turtle won the race.",
    ),
    (
        (
            "One day, a boy named Andy lost his teddy bear. He could not sleep without it. He looked and looked in his "
            "room."
        ),
        "He found his teddy bear under the bed, and he hugged it and went to sleep.",
    ),
    (
        (
            "Once upon a time, there was a princess named Bella. She lived in a big castle, but she had nobody to play "
            "with. One day, a girl came to the door."
        ),
        "The princess let the girl in, and they played in the castle and had tea.",
    ),
    (
        (
            "Once upon a time, there was a little squirrel named Nutty. He had lots of nuts. His friend had no nuts "
            "and winter was near."
        ),
        "He gave his friend half of his nuts, and they were both full all winter.",
    ),
    (
        (
            "One day, a girl named Kate saw dark clouds in the sky. It began to rain very hard. She heard a loud boom "
            "and was scared."
        ),
        "Her mom held her until the rain and the loud noise stopped, and then they saw a rainbow.",
    ),
    (
        (
            "Once upon a time, there was a boy named Mike. He went to the zoo with his dad. He saw a monkey, and it "
            "took his hat!"
        ),
        "The funny monkey put the hat on its own head, and he and his dad laughed and laughed.",
    ),
    (
        (
            "Once upon a time, there was a little spider named Webby. She made a pretty web. Then a big wind came and "
            "broke the web."
        ),
        "The little spider did not give up, and she made a new web that was strong.",
    ),
    (
        (
            "One day, a boy named Nick had a big ice cream. He ran and the ice cream fell on the ground. He started to "
            "cry."
        ),
        "His sister gave him some of her ice cream, and he stopped crying.",
    ),
    (
        (
            "Once upon a time, there was a girl named Mary. It was her first day at school. She was shy and did not "
            "know anyone."
        ),
        "A nice girl asked her to sit with her, and now she had a friend at school.",
    ),
    (
        (
            "Once upon a time, there was a horse named Star. She was sad because she had a hurt leg. The kind doctor "
            "came to see her."
        ),
        "The doctor put something soft on her leg, and soon the horse could run again.",
    ),
    (
        'One day, a boy named Fred had a messy room. He could not find his toys. "You should clean up," said his mom.',
        "He put all his toys in the box, and his room was nice and clean.",
    ),
    (
        (
            "Once upon a time, there was a little star named Twinkle. She lived in the sky, but her light was small. "
            "She felt sad."
        ),
        "The moon told the little star that her light was pretty, and she was bright all night.",
    ),
    (
        (
            "Once upon a time, there was a girl named Ella. She found a shiny ring in the grass. An old lady was "
            "looking for it."
        ),
        "She gave the ring to the old lady, who said thank you and gave her some candy.",
    ),
    (
        (
            'One day, a little boat named Bobby was on the river. He hit a rock and got stuck. "Help me, please!" he '
            "called."
        ),
        "A big boat came and pulled him off the rock, and he went down the river again.",
    ),
    (
        (
            'Once upon a time, there was a boy named Adam. He did not like to eat green beans. "Try one little bite," '
            "said his dad."
        ),
        "He took a bite of the beans, and they were so yummy that he ate them all.",
    ),
    (
        (
            'Once upon a time, there was a little sheep named Woolly. She saw a wolf and ran to hide. "I just want to '
            'be your friend," said the wolf.'
        ),
        "The sheep saw that the wolf was nice, and they became good friends.",
    ),
    (
        (
            "One day, a girl named Grace took her doll to the park in a wagon. The wagon was heavy and she was tired. "
            "A boy came by."
        ),
        'The boy helped her pull the wagon home, and she said, "Thank you," and smiled.',
    ),
    (
        (
            "Once upon a time, there was a butterfly named Flutter. She fell in the water and her wings got wet. She "
            "could not fly."
        ),
        "The sun made her wings dry, and the butterfly flew up to the flowers.",
    ),
    (
        (
            "Once upon a time, there was a boy named Luke. He had a drum and he played it very loud. His baby brother "
            "could not sleep."
        ),
        "He stopped playing the drum and gave it a rest, and the baby went to sleep.",
    ),
    (
        (
            "One day, a girl named Nina picked apples with her grandpa. The best apple was too high. She could not "
            "reach it."
        ),
        "Her grandpa lifted her up so she could pick the best apple, and it was very sweet.",
    ),
    (
        (
            "Once upon a time, there was a little dragon named Puff. He blew fire by mistake and all the kids ran "
            "away. He was very lonely."
        ),
        "One boy asked the dragon to light a fire so they could stay warm, and then all the kids liked him.",
    ),
    (
        (
            "Once upon a time, there was a robot named Beep. He could walk and talk, but one day he stopped. A girl "
            "saw that he could not move."
        ),
        "She gave the robot a new battery, and he started to walk and talk and dance.",
    ),
    (
        "One day, a little boy named Jim jumped in a big puddle. Splash! His socks and his shoes were all wet.",
        "His mom laughed and gave him dry socks and dry shoes, and he felt warm.",
    ),
    (
        (
            'Once upon a time, there was a girl named Zoe. She could not sleep at night. "Daddy, will you read me a '
            'book?" she asked.'
        ),
        "Her daddy read the book to her, and she closed her eyes and fell asleep.",
    ),
    (
        "Once upon a time, there was a fireman named Dan. He had a big red truck. One day, he saw a house with a fire.",
        "He drove the truck to the house and put out the fire with water, and everyone was safe.",
    ),
    (
        (
            "One day, a goat named Gigi wanted to cross a bridge. A sheep wanted to cross it too. The bridge was too "
            "small for both."
        ),
        "The goat let the sheep cross the bridge first, and then it was her turn.",
    ),
    (
        (
            "Once upon a time, there was a boy named Eric. He had a jar with a bug in it. The bug was sad and wanted "
            "to be free."
        ),
        "He opened the jar and let the bug go, and the bug flew away and was happy.",
    ),
    (
        (
            "Once upon a time, there was an owl named Hoot. He was awake at night, but all his friends were sleeping. "
            "He had no one to talk to."
        ),
        "Then a bat came out to fly at night too, and the owl had a friend to talk to.",
    ),
)
COUNT = len(STORIES)


def items(units: Sequence[int], rng: random.Random) -> list[Item]:
    """One item for each of `units`, at least four, in their order; the distractors are other units' endings."""
    return draw.matches([(opening, f" {ending}") for opening, ending in STORIES], units, rng)
