package reconcile

import "context"

// rounds makes one look of many at the ends of a corner's grants: when a subtree
// falls, each of thousands of withdrawals wants one, and each look sees them all.
type rounds struct {
	running bool
	next    *round // nil: nobody waits
}

// round is a look that has not begun, and those who wait for it.
type round struct {
	done chan struct{}
	err  error
}

// recordGone puts on record which grants of a corner have nothing left. The look at
// them begins after the call; who calls while another one is under way shares the
// next with all who do.
func (r *Reconciler) recordGone(ctx context.Context, c corner) error {
	r.mu.Lock()
	q := r.gone[c]
	if q == nil {
		q = &rounds{}
		r.gone[c] = q
	}
	if q.running {
		if q.next == nil {
			q.next = &round{done: make(chan struct{})}
		}
		mine := q.next
		r.mu.Unlock()
		select {
		case <-mine.done:
			return mine.err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	q.running = true
	r.mu.Unlock()
	err := r.recordAllGone(ctx, c)
	for {
		r.mu.Lock()
		next := q.next
		q.next = nil
		if next == nil {
			delete(r.gone, c)
			r.mu.Unlock()
			return err
		}
		r.mu.Unlock()
		// It is not this caller's alone, whose own context may have ended.
		next.err = r.recordAllGone(r.ctx, c)
		close(next.done)
	}
}
