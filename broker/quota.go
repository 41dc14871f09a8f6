package broker

import (
	"context"
	"math"
	"sync"

	"github.com/google/uuid"
	"golang.org/x/time/rate"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
)

// quotas bound what guests put on record. Nothing is ever taken off the ledger,
// so a guest that asks and drops, or is refused, for days would fill the disk at
// any rate that an honest burst needs. They outlive a VM's runs: a guest cannot
// get a new one by rebooting.
type quotas struct {
	perMinute, burst int

	mu sync.Mutex
	of map[uuid.UUID]*quota
}

type quota struct {
	limiter *rate.Limiter
	spent   bool
}

// take is one more record for a VM. Where it has none left, ok is false; first
// tells the refusal that is the first one since it had many left: a guest that
// goes on asking is not noted at each one that it gets.
func (q *quotas) take(vm uuid.UUID) (ok, first bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	one := q.of[vm]
	if one == nil {
		one = &quota{limiter: rate.NewLimiter(rate.Limit(float64(q.perMinute)/60), q.burst)}
		if q.of == nil {
			q.of = map[uuid.UUID]*quota{}
		}
		q.of[vm] = one
	}
	ok = one.limiter.Allow()
	first = !ok && !one.spent
	one.spent = !ok || one.spent && one.limiter.Tokens() < float64(q.burst)/2
	return ok, first
}

// mayRecord refuses a guest that has put too much on record, and records the
// first of such refusals.
func (s guestService) mayRecord(ctx context.Context, vm uuid.UUID) error {
	ok, first := s.b.quotas.take(vm)
	if ok {
		return nil
	}
	s.b.metrics.limited.Inc()
	if first {
		_, err := s.b.ledger.Update(context.WithoutCancel(ctx), func(tx *ledger.Tx) error {
			partition, _ := tx.State().Binding(vm)
			return tx.Append(ledger.Event{
				Type: ledger.GuestLimited, Actor: ledger.Actor{Kind: ledger.ActorVM, VM: vm}, VM: vm, Partition: partition,
			})
		})
		if err != nil {
			s.b.log.Error("cannot record that a guest asks too often", "vm", vm, "err", err)
		}
	}
	e := api.Errorf(api.CodeRateLimited, "the VM asks too often")
	e.RetryAfter = int(math.Ceil(60 / float64(s.b.o.GuestRequests)))
	return e
}
