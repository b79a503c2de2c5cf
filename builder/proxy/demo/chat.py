"""Everyday questions, and for each the helpful reply to find among replies to other questions."""

from __future__ import annotations

import random
from collections.abc import Sequence

from builder.proxy.demo import draw
from builder.proxy.items import Item

# A user's words and the reply to them.
EXCHANGES: tuple[tuple[str, str], ...] = (
    (
        "How can I fall asleep faster at night?",
        (
            "Try to go to bed at the same time every day and put screens away an hour before. A dark, cool room and "
            "slow breathing can also help you fall asleep."
        ),
    ),
    (
        "What should I bring to a friend's dinner party?",
        (
            "A bottle of wine, some flowers, or a small dessert is always welcome. You can also ask your host if there"
            " is a dish they would like you to bring."
        ),
    ),
    (
        "How do I keep my houseplants from dying?",
        (
            "Check the soil with your finger and water only when it feels dry. Most houseplants also need a bright "
            "spot near a window and a pot that drains well."
        ),
    ),
    (
        "Can you suggest an easy breakfast with eggs?",
        (
            "You could scramble two eggs with a little butter and milk and serve them on toast. Add some chopped "
            "tomato or cheese for more flavor."
        ),
    ),
    (
        "How do I make new friends after moving to a new city?",
        (
            "Join a club, class, or sports team where you meet the same people every week. Say yes to invitations and "
            "be the first to suggest a coffee."
        ),
    ),
    (
        "Why is the sky blue?",
        (
            "Sunlight is scattered by the air, and blue light is scattered much more than red. That scattered blue "
            "light reaches our eyes from every direction."
        ),
    ),
    (
        "What should I pack for a weekend hike?",
        (
            "Pack water, snacks, a map, a rain jacket, and a small first aid kit. Wear sturdy shoes and take an extra "
            "pair of socks."
        ),
    ),
    (
        "How can I stop biting my nails?",
        (
            "Notice when you do it and give your hands something else, such as a stress ball. Keeping your nails short"
            " or using a bitter polish can help too."
        ),
    ),
    (
        "Write a short thank you note to my neighbor for feeding my cat.",
        (
            "Dear neighbor, thank you so much for feeding my cat while I was away. She was happy and well fed, and I "
            "am very grateful for your kindness."
        ),
    ),
    (
        "How do I cook rice so it is not sticky?",
        (
            "Rinse the rice until the water runs clear, then cook it covered on low heat. Let it rest for ten minutes "
            "and fluff it with a fork."
        ),
    ),
    (
        "What is the best way to learn a new language?",
        (
            "Practice a little every day and start speaking as early as you can. Listening to songs and shows in that "
            "language helps you pick up new words."
        ),
    ),
    (
        "How can I save money on groceries?",
        (
            "Plan your meals, write a list, and stick to it in the store. Buying store brands and seasonal vegetables "
            "can also lower your grocery bill."
        ),
    ),
    (
        "My coworker keeps interrupting me in meetings. What can I do?",
        (
            "Stay calm and say that you would like to finish your point. If it keeps happening in meetings, talk to "
            "your coworker in private and explain how it feels."
        ),
    ),
    (
        "How often should I brush my teeth?",
        (
            "Dentists recommend brushing twice a day for two minutes, in the morning and before bed. Use a soft brush "
            "and floss once a day as well."
        ),
    ),
    (
        "What is a good gift for my grandmother's birthday?",
        (
            "A photo album with family pictures makes a lovely birthday gift for a grandmother. You could add a "
            "handwritten letter or her favorite chocolates."
        ),
    ),
    (
        "How do I remove a coffee stain from a white shirt?",
        (
            "Rinse the stain with cold water as soon as possible, then rub in a little dish soap. Let it soak before "
            "washing the shirt as usual."
        ),
    ),
    (
        "Can you recommend a way to get over a fear of flying?",
        (
            "Learn how planes work and practice slow breathing before takeoff. Some people also find that a course for"
            " nervous flyers makes them feel much safer."
        ),
    ),
    (
        "What do bees do in winter?",
        (
            "Bees stay in the hive and form a tight ball around their queen to keep warm. They eat the honey that they"
            " stored during the summer."
        ),
    ),
    (
        "How do I write a good email to ask for a day off?",
        (
            "Keep it short and polite, name the date you need, and say who will cover your work. Send it to your "
            "manager as early as you can."
        ),
    ),
    (
        "What should I see on my first visit to Paris?",
        (
            "Start with the Eiffel Tower, the Louvre, and a walk along the Seine. Leave time to sit in a cafe and "
            "enjoy the streets of Montmartre."
        ),
    ),
    (
        "How can I drink more water during the day?",
        (
            "Keep a full bottle on your desk and take a sip whenever you notice it. A slice of lemon or cucumber makes"
            " plain water taste better."
        ),
    ),
    (
        "How do I train my puppy to sit?",
        (
            "Hold a treat above the puppy's nose and move it back until it sits down. Say the word sit, give the "
            "treat, and repeat in short sessions."
        ),
    ),
    (
        "What can I cook with chicken and potatoes?",
        (
            "Roast the chicken and potatoes together on one tray with olive oil, garlic, and rosemary. Bake until the "
            "chicken is cooked through and the potatoes are golden."
        ),
    ),
    (
        "I feel nervous before job interviews. Any advice?",
        (
            "Practice answers to common questions out loud and learn about the company beforehand. Arrive early, "
            "breathe slowly, and remember that the interviewer wants you to do well."
        ),
    ),
    (
        "How do I clean a dirty oven?",
        (
            "Spread a paste of baking soda and water inside the oven and leave it overnight. Wipe it off with a damp "
            "cloth and spray vinegar on stubborn spots."
        ),
    ),
    (
        "What is the difference between a frog and a toad?",
        (
            "Frogs usually have smooth, wet skin and long legs for jumping. Toads have dry, bumpy skin and shorter "
            "legs, and they live more on land."
        ),
    ),
    (
        "How do I say sorry to a friend after an argument?",
        (
            "Tell your friend honestly that you are sorry and say what you did wrong. Listen to how they feel and do "
            "not make excuses."
        ),
    ),
    (
        "Which exercises can I do at home without equipment?",
        (
            "Squats, push-ups, lunges, and planks all work well at home with no equipment. Start with short rounds and"
            " add more as you get stronger."
        ),
    ),
    (
        "How can I make my small apartment look bigger?",
        (
            "Use light colors, mirrors, and furniture with legs to open up the room. Keep the floor clear and store "
            "things on high shelves."
        ),
    ),
    (
        "What should I do if I lose my passport abroad?",
        (
            "Report the loss to the local police and contact your embassy right away. The embassy can give you an "
            "emergency passport so that you can travel home."
        ),
    ),
    (
        "How do I get my child to eat vegetables?",
        (
            "Offer small portions often and let your child help to wash and cook them. Eating vegetables yourself sets"
            " the best example, so stay patient."
        ),
    ),
    (
        "Write a short birthday message for my brother.",
        (
            "Happy birthday to the best brother I could ask for! I hope your day is full of laughter, cake, and "
            "everything that makes you happy."
        ),
    ),
    (
        "How long should I boil an egg?",
        (
            "Boil it for about six minutes if you like a soft yolk, or ten minutes for a hard one. Cool it in cold "
            "water before you peel it."
        ),
    ),
    (
        "Why do leaves change color in autumn?",
        (
            "In autumn trees stop making the green pigment that they use to catch sunlight. As the green fades, the "
            "yellow and red colors in the leaves show."
        ),
    ),
    (
        "How do I stop my glasses from fogging up?",
        (
            "Wash the lenses with a drop of soap and let them dry in the air. A mask that fits tightly over the nose "
            "also keeps warm breath away."
        ),
    ),
    (
        "What is a polite way to turn down an invitation?",
        (
            "Thank the person for thinking of you and say simply that you cannot make it. You can suggest another day "
            "if you would like to meet."
        ),
    ),
    (
        "How can I be on time more often?",
        (
            "Plan to arrive ten minutes early and set an alarm for when you must leave. Lay out your keys and clothes "
            "the evening before."
        ),
    ),
    (
        "Can I freeze bread?",
        (
            "Yes, bread freezes very well for up to three months in a sealed bag. Slice it first so that you can toast"
            " one piece at a time."
        ),
    ),
    (
        "What are some fun games for a long car ride with kids?",
        (
            "Try twenty questions, I spy, or spotting license plates from different places. Audio books and songs are "
            "also great for keeping kids happy in the car."
        ),
    ),
    (
        "How do I care for a sunburn?",
        (
            "Cool the skin with a damp cloth and put on aloe vera or a light lotion. Drink plenty of water and stay "
            "out of the sun until it heals."
        ),
    ),
    (
        "How do I choose a ripe avocado?",
        (
            "Press it gently in your palm, and if it gives a little it is ripe. A hard avocado will ripen in a few "
            "days next to a banana."
        ),
    ),
    (
        "What causes thunder?",
        (
            "Lightning heats the air around it so fast that the air expands with a loud boom. We hear thunder later "
            "because sound travels more slowly than light."
        ),
    ),
    (
        "How do I keep my kitchen knives sharp?",
        (
            "Use a honing steel often and sharpen the blades on a stone a few times a year. Cut on wood and never put "
            "knives in the dishwasher."
        ),
    ),
    (
        "I want to start running. How should I begin?",
        (
            "Begin with short runs of one minute and walk in between, three times a week. Good running shoes and a "
            "slow pace help you avoid injuries."
        ),
    ),
    (
        "How much should I tip in a restaurant in the United States?",
        (
            "It is common to leave between fifteen and twenty percent of the bill for good service. Check first "
            "whether a service charge has already been added."
        ),
    ),
    (
        "How can I help my dog stay calm during fireworks?",
        (
            "Close the curtains, play soft music, and give your dog a cozy place to hide. Stay relaxed yourself and "
            "take a long walk before dark."
        ),
    ),
    (
        "What makes a good password?",
        (
            "A good password is long, hard to guess, and different for every account. A password manager can create "
            "strong ones and remember them for you."
        ),
    ),
    (
        "How do I fold a fitted sheet?",
        (
            "Put your hands into two corners and tuck one corner into the other. Do the same with the other side, then"
            " lay the sheet flat and fold it."
        ),
    ),
    (
        "What can I do about a sore throat?",
        (
            "Drink warm tea with honey and gargle with salt water a few times a day. See a doctor if the pain is "
            "strong or lasts more than a week."
        ),
    ),
    (
        "Write a short invitation to a summer barbecue.",
        (
            "You are invited to our summer barbecue this Saturday at four in our garden. Bring your appetite and a "
            "friend, and we will take care of the grill."
        ),
    ),
    (
        "How do I remember people's names better?",
        (
            "Repeat the name aloud when you meet someone and use it again as you talk. Linking the name to a picture "
            "in your mind also helps."
        ),
    ),
    (
        "Should I take an umbrella to London?",
        (
            "Yes, a small folding umbrella is a good idea, since rain in London can come at any time of year. A light "
            "raincoat works well too."
        ),
    ),
    (
        "How can I make my own pizza sauce?",
        (
            "Simmer canned tomatoes with garlic, olive oil, oregano, and a pinch of salt for twenty minutes. Blend it "
            "if you like your sauce smooth."
        ),
    ),
    (
        "How can I spend less time on my phone?",
        (
            "Turn off notifications you do not need and leave the phone in another room at night. Setting a daily "
            "limit for social apps also works."
        ),
    ),
    (
        "What is the tallest animal in the world?",
        (
            "The giraffe is the tallest animal on land and can grow to more than five meters. Its long neck lets it "
            "eat leaves from high trees."
        ),
    ),
    (
        "How do I pick a good book for my book club?",
        (
            "Choose a book that is not too long and leaves room for different opinions. You could suggest three titles"
            " and let the members vote."
        ),
    ),
    (
        "My neighbor plays loud music at night. How should I handle it?",
        (
            "Speak to your neighbor kindly first, since they may not know how far the sound carries. If the noise goes"
            " on, write down the times and contact your landlord."
        ),
    ),
    (
        "How do I wash a wool sweater?",
        (
            "Wash it by hand in cool water with a mild detergent and do not wring it. Lay the sweater flat on a towel "
            "so that it keeps its shape."
        ),
    ),
    (
        "What is a good stretch for a stiff back?",
        (
            "Kneel on the floor, sit back on your heels, and reach your arms forward. Hold this stretch for thirty "
            "seconds while you breathe, and stop if it hurts."
        ),
    ),
    (
        "How do I start a small herb garden?",
        (
            "Basil, mint, and parsley are easy herbs that grow well in pots on a sunny windowsill. Pick the leaves "
            "often so that the plants stay bushy."
        ),
    ),
    (
        "How can I overcome jet lag?",
        (
            "Change to the local time at once and spend the first day outside in daylight. Short naps are fine, but "
            "try to stay awake until evening."
        ),
    ),
    (
        "What should I write in a card for a coworker who is retiring?",
        (
            "You could write that you enjoyed working together and wish them a happy and relaxing retirement. A funny "
            "memory from the office makes it personal."
        ),
    ),
    (
        "How do I change a flat bicycle tire?",
        (
            "Take off the wheel, lift the tire with levers, and pull out the tube. Put in a new tube, pump it up a "
            "little, and press the tire back on."
        ),
    ),
    (
        "Is it okay to drink coffee every day?",
        (
            "For most adults, up to three or four cups of coffee a day is fine. Drink it before the afternoon if it "
            "keeps you awake at night."
        ),
    ),
)
COUNT = len(EXCHANGES)


def items(units: Sequence[int], rng: random.Random) -> list[Item]:
    """One item for each of `units`, at least four, in their order; the distractors are other units' replies."""
    return draw.matches([(f"User: {ask}\nAssistant:", f" {reply}") for ask, reply in EXCHANGES], units, rng)
