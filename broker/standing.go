package broker

import (
	"slices"

	"spectrum-os.org/broker/broker/ledger"
)

// inStates are those of the grants that stand in one of the states, if any are
// given.
func (b *Broker) inStates(grants []ledger.Grant, states []ledger.GrantState) []ledger.Grant {
	return slices.DeleteFunc(grants, func(g ledger.Grant) bool {
		return len(states) > 0 && !slices.Contains(states, b.shown(g).State)
	})
}

// recorded are the states on record of grants that may stand in one of these.
func recorded(states []ledger.GrantState) []ledger.GrantState {
	if slices.Contains(states, ledger.Revoking) {
		return append(slices.Clone(states), liveStates...)
	}
	return states
}
