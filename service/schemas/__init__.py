"""The bodies that the endpoints take and the answers that they give, in OpenAI's shapes."""
