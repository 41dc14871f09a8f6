package shim

import (
	"context"
	"errors"
	"sync"
	"time"
)

// calls hands the VMM its requests, one at a time as it serves them, and lets
// those that take something away go first.
type calls struct {
	mu    sync.Mutex
	first []*call
	then  []*call
	wake  chan struct{}
	ended chan struct{}
}

// call is one request. err may be read once done is closed.
type call struct {
	do      func(context.Context) error
	timeout time.Duration
	queue   *calls
	begun   bool
	done    chan struct{}
	err     error
}

var (
	errInstanceEnded = errors.New("the VM has ended")
	errTakenBack     = errors.New("the request was taken back")
)

// newCalls runs the requests until ctx ends, and then refuses them.
func newCalls(ctx context.Context) *calls {
	q := &calls{wake: make(chan struct{}, 1), ended: make(chan struct{})}
	go q.run(ctx)
	return q
}

func (q *calls) run(ctx context.Context) {
	defer close(q.ended)
	for {
		c := q.next()
		if c == nil {
			select {
			case <-q.wake:
				continue
			case <-ctx.Done():
			}
		}
		if ctx.Err() != nil {
			if c == nil {
				return
			}
			c.finish(errInstanceEnded)
			continue
		}
		callCtx, cancel := context.WithTimeout(ctx, c.timeout)
		err := c.do(callCtx)
		cancel()
		if err != nil && ctx.Err() != nil {
			err = errInstanceEnded
		}
		c.finish(err)
	}
}

func (q *calls) next() *call {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, list := range []*[]*call{&q.first, &q.then} {
		if len(*list) > 0 {
			c := (*list)[0]
			*list = (*list)[1:]
			c.begun = true
			return c
		}
	}
	return nil
}

// submit queues a request: before all others that are not urgent if it is.
func (q *calls) submit(urgent bool, timeout time.Duration, do func(context.Context) error) *call {
	c := &call{do: do, timeout: timeout, queue: q, done: make(chan struct{})}
	q.mu.Lock()
	if urgent {
		q.first = append(q.first, c)
	} else {
		q.then = append(q.then, c)
	}
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
	return c
}

// cancel takes the request back if the VMM has not seen it, and tells whether
// that is so.
func (c *call) cancel() bool {
	c.queue.mu.Lock()
	defer c.queue.mu.Unlock()
	if c.begun {
		return false
	}
	for _, list := range []*[]*call{&c.queue.first, &c.queue.then} {
		for i, other := range *list {
			if other == c {
				*list = append((*list)[:i:i], (*list)[i+1:]...)
				c.begun = true
				c.finish(errTakenBack)
				return true
			}
		}
	}
	return false
}

func (c *call) finish(err error) {
	c.err = err
	close(c.done)
}

// wait returns the outcome, or errInstanceEnded when nobody serves the queue
// any more.
func (c *call) wait() error {
	select {
	case <-c.done:
		return c.err
	case <-c.queue.ended:
		select {
		case <-c.done:
			return c.err
		default:
			return errInstanceEnded
		}
	}
}
