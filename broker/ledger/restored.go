package ledger

import (
	"fmt"

	"github.com/google/uuid"
)

// RestoredData is the Data of ledger.restored, the first event after those of
// a backup. It begins a new epoch: every grant that is not final ends with it,
// and no token of before is accepted.
type RestoredData struct {
	Epoch  uint64 `json:"epoch"`
	From   Anchor `json:"from"` // the newest event of the backup
	Reason string `json:"reason"`
	// Replaced is what the state directory knew of the ledger that this one took
	// the place of.
	Replaced *Mark `json:"replaced,omitempty"`
}

func (f *folder) restored(l *layer, e *entry) error {
	d, err := read[RestoredData](e)
	if err != nil {
		return err
	}
	if d.Epoch <= l.meta.epoch {
		return fmt.Errorf("%w: %s of epoch %d in epoch %d", ErrIllegalMove, e.Type, d.Epoch, l.meta.epoch)
	}
	if at := (Anchor{l.meta.seq, l.meta.hash}); d.From != at {
		return fmt.Errorf("%w: %s from event %d (%s), and it follows event %d (%s)", ErrIllegalMove, e.Type, d.From.Seq, d.From.Hash, at.Seq, at.Hash)
	}
	if d.Reason == "" {
		return fmt.Errorf("%w: %s without a reason", ErrInvalidEvent, e.Type)
	}
	l.meta.epoch = d.Epoch
	l.meta.changeKeys(e.Seq, func(keys []signingKey) []signingKey { return retire(keys, e) })
	reason := f.in.string([]byte(d.Reason))
	for _, i := range l.open(uuid.Nil) {
		if l.get(i).stateName().Ended() {
			continue
		}
		n := l.mut(i)
		m, err := move(n.stateName(), GrantRevoking)
		if err != nil {
			return err
		}
		n.state = stateIndex(m.To)
		n.generation++
		next := note{}
		if n.note != nil {
			next = *n.note
		}
		next.reason, next.changed, next.revoking = reason, e.Seq, e.Time.UnixNano()
		n.note = &next
	}
	return nil
}
