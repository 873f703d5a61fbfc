"""Which scheme each product gets under a budget of bytes: sensitivities, and the choice by a knapsack."""
