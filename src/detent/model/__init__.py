"""A model with quantizers as a whole: conversion, state, weights, scopes."""
