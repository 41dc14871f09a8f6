package ledger

import (
	"fmt"
	"strings"
)

// GrantState is where a grant stands.
type GrantState string

// The states of a grant. Expiry is not one: it is a revocation by the clock,
// and until it is recorded State.Live says that the grant is dead.
const (
	Pending  GrantState = "pending"  // decided, not yet seen in the world
	Active   GrantState = "active"   // seen in the world
	Revoking GrantState = "revoking" // ended, its objects may still exist
	Revoked  GrantState = "revoked"  // ended, its objects are seen to be gone
	Failed   GrantState = "failed"   // never came to exist, nothing is left of it
)

// Ended says that the grant gives nothing any more, whatever still exists of
// it.
func (s GrantState) Ended() bool { return s != Pending && s != Active }

// Final says that no move leads out of the state.
func (s GrantState) Final() bool { return s == Revoked || s == Failed }

// Move is one allowed move of a grant's state. An empty From is the grant
// coming into being.
type Move struct {
	From, To GrantState
	Event    EventType
	Desired  bool // what should exist changes with it, so the generation rises
}

// Moves is the whole table of allowed moves; what is not in it is refused.
func Moves() []Move {
	return []Move{
		{"", Pending, GrantRequested, true},
		{Pending, Active, GrantActive, false},
		{Pending, Failed, GrantFailed, true},
		{Pending, Revoking, GrantRevoking, true},
		{Active, Revoking, GrantRevoking, true},
		{Revoking, Revoked, GrantRevoked, false},
	}
}

type moveKey struct {
	from  GrantState
	event EventType
}

var moveTable = buildMoveTable()

func buildMoveTable() map[moveKey]Move {
	m := make(map[moveKey]Move)
	for _, v := range Moves() {
		m[moveKey{v.From, v.Event}] = v
	}
	return m
}

// move is the only way from one state to another.
func move(from GrantState, event EventType) (Move, error) {
	if m, ok := moveTable[moveKey{from, event}]; ok {
		return m, nil
	}
	if from == "" {
		return Move{}, fmt.Errorf("%w: %s of a grant that does not exist", ErrIllegalMove, event)
	}
	return Move{}, fmt.Errorf("%w: %s of a grant that is %s", ErrIllegalMove, event, from)
}

// MovesMermaid draws the table as a Mermaid state diagram, for the docs.
func MovesMermaid() string {
	var b strings.Builder
	b.WriteString("stateDiagram-v2\n")
	final := map[GrantState]bool{}
	var order []GrantState
	for _, m := range Moves() {
		from := string(m.From)
		if from == "" {
			from = "[*]"
		}
		fmt.Fprintf(&b, "    %s --> %s: %s\n", from, m.To, m.Event)
		if m.To.Final() && !final[m.To] {
			final[m.To] = true
			order = append(order, m.To)
		}
	}
	for _, s := range order {
		fmt.Fprintf(&b, "    %s --> [*]\n", s)
	}
	return b.String()
}
