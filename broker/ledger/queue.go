package ledger

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
)

// update is one Update that waits for its turn.
type update struct {
	fn       func(tx *Tx) error
	events   []Event
	err      error
	panicked any
	// alone is run instead of fn by one who leads the writing, while nobody writes.
	alone func() error
	turn  chan bool // true: it leads; false: it is done
}

// call runs fn. A panic is the caller's: it must not end who leads, and with it
// everybody's updates.
func (u *update) call(tx *Tx) {
	defer func() { u.panicked = recover() }()
	u.err = u.fn(tx)
}

// queue makes one writer of many callers. Who comes when nobody writes leads: it
// commits by itself, without a goroutine to hand its update to and to be woken by,
// which costs as much as the commit. Who comes meanwhile waits, and shares the
// next commit, which the first of them leads.
type queue struct {
	mu      sync.Mutex
	waiting []*update
	led     bool
	closed  bool
	done    chan struct{} // closed when the queue is, and nobody leads any more
	shared  bool          // the last commit was; only who leads uses it
}

func newQueue() *queue { return &queue{done: make(chan struct{})} }

// enter returns with the lead, or once u is done.
func (q *queue) enter(ctx context.Context, u *update) (lead bool, err error) {
	q.mu.Lock()
	switch {
	case q.closed:
		q.mu.Unlock()
		return false, ErrClosed
	case !q.led:
		q.led = true
		q.mu.Unlock()
		return true, nil
	}
	u.turn = make(chan bool, 1)
	q.waiting = append(q.waiting, u)
	q.mu.Unlock()
	select {
	case lead = <-u.turn:
		return lead, u.err
	case <-ctx.Done():
	}
	if q.forget(u) {
		return false, fmt.Errorf("%w: %w", ErrNotRecorded, ctx.Err())
	}
	// It is under way: the outcome is not the context's to tell.
	lead = <-u.turn
	return lead, u.err
}

// forget takes back an update that nobody has begun.
func (q *queue) forget(u *update) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	i := slices.Index(q.waiting, u)
	if i < 0 {
		return false
	}
	q.waiting = slices.Delete(q.waiting, i, i+1)
	return true
}

// gather takes all updates that wait already: they share u's commit, and its one
// fdatasync.
func (q *queue) gather(u *update) []*update {
	if q.shared {
		// Those who were told of the last commit are about to come again.
		runtime.Gosched()
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	n := 0
	for n < len(q.waiting) && n < maxBatch-1 && q.waiting[n].alone == nil {
		n++
	}
	q.shared = n > 0
	batch := append(make([]*update, 0, 1+n), u)
	batch = append(batch, q.waiting[:n]...)
	q.waiting = slices.Delete(q.waiting, 0, n)
	return batch
}

// leave hands on the lead.
func (q *queue) leave() {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case q.closed:
		close(q.done)
	case len(q.waiting) > 0:
		next := q.waiting[0]
		q.waiting = slices.Delete(q.waiting, 0, 1)
		next.turn <- true
	default:
		q.led = false
	}
}

// close refuses all that wait, and all that come, and returns once nobody leads.
func (q *queue) close() {
	q.mu.Lock()
	if !q.closed {
		q.closed = true
		for _, u := range q.waiting {
			u.err = ErrClosed
			u.turn <- false
		}
		q.waiting = nil
		if !q.led {
			close(q.done)
		}
	}
	q.mu.Unlock()
	<-q.done
}

// run has u done, whoever does it.
func (l *Ledger) run(ctx context.Context, u *update) error {
	lead, err := l.queue.enter(ctx, u)
	if !lead {
		return err
	}
	defer l.queue.leave()
	if u.alone != nil {
		return u.alone()
	}
	l.lead(l.queue.gather(u))
	return u.err
}

// lead commits a batch, whose first update is the caller's, and tells the others.
func (l *Ledger) lead(batch []*update) {
	whole := false
	defer func() {
		if !whole {
			// What a mistake of this package's has left is read again before anything
			// rests on it, and nobody waits for it.
			l.failed(batch, true, errMistake)
		}
		for _, u := range batch[1:] {
			u.turn <- false
		}
	}()
	l.commit(batch)
	whole = true
}

// errMistake is the reason to read the ledger again after a panic.
var errMistake = errors.New("a commit was broken off by a mistake in the broker")
