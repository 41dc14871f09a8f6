package ledger

import "fmt"

// troubled folds the beginning and the end of a time in which what a grant
// stands for cannot be made or taken away. It moves nothing. Each is recorded
// once: a trouble that goes on is not told again.
func (f *folder) troubled(l *layer, e *entry) error {
	i, ok := l.find(e.Grant)
	if !ok {
		return fmt.Errorf("%w: %s of a grant that does not exist", ErrIllegalMove, e.Type)
	}
	d, err := read[Change](e)
	if err != nil {
		return err
	}
	begins := e.Type == GrantTroubled
	if begins && d.Reason == "" {
		return fmt.Errorf("%w: %s without a reason", ErrInvalidEvent, e.Type)
	}
	n := l.get(i)
	if state := n.stateName(); state.Final() {
		return fmt.Errorf("%w: %s of a grant that is %s", ErrIllegalMove, e.Type, state)
	}
	next := note{}
	if n.note != nil {
		next = *n.note
	}
	if begins == (next.troubled != nil) {
		return fmt.Errorf("%w: %s of a grant that is that already", ErrIllegalMove, e.Type)
	}
	next.troubled = nil
	if begins {
		next.troubled = &d.Reason
	}
	l.mut(i).note = &next
	return nil
}
