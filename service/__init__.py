"""A request, answered: a bundle behind the OpenAI API."""
