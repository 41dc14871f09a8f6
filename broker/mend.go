package broker

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
)

// unrecorded is the answer when the ledger cannot be written: no, with the reason
// and what to do about it.
func unrecorded(outcome string, err error) error {
	what, remedy := ledger.Diagnose(err)
	return api.Errorf(api.CodeUnavailable, "the ledger cannot be written, so %s: %s; %s", outcome, what, remedy).WithCause(err)
}

// uncertain is unrecorded for what may turn out to be on record all the same,
// and which nobody takes back then.
func uncertain(outcome string, err error) error {
	if errors.Is(err, ledger.ErrUnknownOutcome) {
		outcome = "it is not known before the ledger was read again whether that is on record; if not, " + outcome
	}
	return unrecorded(outcome, err)
}

// disown sees to it that a grant which was refused because the outcome of its
// commit is unknown is not in force if it turns out to be on record. The ledger
// must not be reopened between that commit and this.
func (b *Broker) disown(id uuid.UUID, err error) {
	if !errors.Is(err, ledger.ErrUnknownOutcome) {
		return
	}
	b.reconciler.Bar(id)
	t := tombstone{brokerActor, "its request was refused, as the ledger could not be written"}
	b.mu.Lock()
	b.unrecorded[id] = t
	b.mu.Unlock()
	if err := writeTombstone(b.tombstones(), id.String(), t); err != nil {
		b.log.Error("a grant that was refused may be in force if the broker is restarted before the ledger can be written", "grant", id, "err", err)
	}
}

// ledgerProblems are what health says of the ledger.
func (b *Broker) ledgerProblems() (problems []string) {
	if err := b.ledger.Trouble(); err != nil {
		what, remedy := ledger.Diagnose(err)
		problems = append(problems, fmt.Sprintf("the ledger cannot be written, so nothing is granted: %s; %s", what, remedy))
	}
	b.mu.Lock()
	late := len(b.unrecorded)
	b.mu.Unlock()
	if late > 0 {
		problems = append(problems, fmt.Sprintf("%d grants were taken back, which the ledger was not told yet; do not restart the host before", late))
	}
	return problems
}

// mending is what is tried to have a ledger in working order again.
type mending struct {
	next  time.Time
	pause time.Duration
	said  string
}

// mend looks whether the ledger can be written, and where it could not, tries
// again: by itself a full disk is made room on, a file system mounted writable, a
// cable put back. What is on the disk counts then, whatever was in memory.
func (b *Broker) mend(ctx context.Context, m *mending) {
	// Poisoned where a file is not in its place.
	_ = b.ledger.Check()
	if b.ledger.Trouble() == nil {
		if m.said != "" {
			b.log.Info("the ledger can be written again")
		}
		*m = mending{}
		return
	}
	began := time.Now()
	if began.Before(m.next) {
		return
	}
	var err error
	if b.ledger.Poisoned() != nil {
		b.reopening.Lock()
		err = b.ledger.Reopen(ctx)
		b.reopening.Unlock()
	}
	if err == nil {
		// That it could be read says nothing of writing.
		_, err = b.ledger.Update(ctx, func(tx *ledger.Tx) error {
			return tx.Append(ledger.Event{
				Type: ledger.ClockHighwater, Actor: brokerActor,
				Data: ledger.JSON(ledger.HighwaterData{Wall: tx.Now().Wall}),
			})
		})
	}
	if err == nil || ctx.Err() != nil {
		return
	}
	if what, remedy := ledger.Diagnose(err); what != m.said {
		m.said = what
		b.log.Error("the ledger cannot be written", "why", what, "remedy", remedy, "err", err)
	}
	// To read a long ledger takes its time; a disk that was mended should not
	// have to wait.
	const shortest, longest = time.Second, 5 * time.Second
	m.pause = max(min(2*m.pause, longest), shortest, 10*time.Since(began))
	m.next = time.Now().Add(m.pause)
}

// cannotOpen says what to do about a ledger that cannot be opened.
func cannotOpen(err error) error {
	what, remedy := ledger.Diagnose(err)
	if what == err.Error() {
		return err // it says so itself
	}
	return fmt.Errorf("cannot open the ledger: %s; %s: %w", what, remedy, err)
}
