"""Costs of sets of sites as models have them: what a site takes alone, what it shares, what depends on the depth."""

from weightlora.cost.knapsack import ANY, Item, make_cost


def random_cost(draw, n):
    """Sites one above the other, some side by side with a shared input, each with things of all kinds that cost."""
    order = draw.sample(range(n), n)
    items = [Item(draw.randint(0, 30), ((ANY, 1 << n),))]
    place = 0
    while place < n:
        group = order[place : place + draw.randint(1, 3)]
        under = sum(1 << i for i in order[:place])
        items.append(Item(draw.randint(0, 20), tuple((1 << i, 1 << i) for i in group)))
        for i in group:
            items.append(Item(draw.randint(1, 10), ((1 << i, 1 << i),)))
            items.append(Item(draw.randint(0, 5), ((1 << i, under),)))
            items.append(Item(draw.randint(0, 10), ((ANY, under | 1 << i),)))
        place += len(group)
    return make_cost(n, items, order)
