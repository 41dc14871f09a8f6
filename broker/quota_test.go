package broker

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
)

func TestQuotaIsPerVMAndComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := quotas{perMinute: 6, burst: 3}
		spend := func(vm uuid.UUID) (n int) {
			for {
				if ok, _ := q.take(vm); !ok {
					return n
				}
				n++
			}
		}
		if n := spend(mail1); n != 3 {
			t.Errorf("a burst is %d, want 3", n)
		}
		if n := spend(mail2); n != 3 {
			t.Errorf("another VM's burst is %d, want 3: it pays for its neighbour", n)
		}
		time.Sleep(21 * time.Second)
		if n := spend(mail1); n != 2 {
			t.Errorf("after 21 s at 6 a minute there are %d, want 2", n)
		}
	})
}

// A guest that goes on asking is noted once, not at each record that it gets.
func TestSteadySpamIsNotedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := quotas{perMinute: 60, burst: 10}
		noted := 0
		for range 600 { // ten a second, for a minute
			if _, first := q.take(mail1); first {
				noted++
			}
			time.Sleep(100 * time.Millisecond)
		}
		if noted != 1 {
			t.Errorf("noted %d times, want once", noted)
		}
		time.Sleep(time.Minute)
		for range 11 {
			if _, first := q.take(mail1); first {
				noted++
			}
		}
		if noted != 2 {
			t.Errorf("after a rest it is noted %d times in all, want twice", noted)
		}
	})
}

// A guest that asks without end is refused, and what it leaves in the ledger is
// bounded.
func TestGuestThatAsksWithoutEnd(t *testing.T) {
	b := named(t)
	b.o.GuestRequests = 12
	b.quotas = quotas{perMinute: 1, burst: 5}
	s := guestService{b}
	before, _ := b.ledger.Head()
	limited := 0
	for range 200 {
		err := s.refuseToken(context.Background(), mail1, uuid.Nil, errors.New("forged"))
		if e, ok := errors.AsType[*api.Error](err); !ok || e.Code != api.CodeTokenRefused {
			t.Fatalf("a forged token is answered %v", err)
		}
		if err := s.mayRecord(context.Background(), mail1); err != nil {
			e, ok := errors.AsType[*api.Error](err)
			if !ok || e.Code != api.CodeRateLimited || e.RetryAfter != 5 {
				t.Fatalf("it is refused with %v", err)
			}
			limited++
		}
	}
	if limited < 190 {
		t.Errorf("%d of 200 requests were limited", limited)
	}
	events, err := b.ledger.Events(before, ledger.EventFilter{}, 0)
	if err != nil || len(events) > 8 {
		t.Errorf("it left %d events, %v; want a burst's and one that says so", len(events), err)
	}
	said := 0
	for _, e := range events {
		if e.Type == ledger.GuestLimited && e.VM == mail1 && e.Partition == uuid.Nil {
			said++
		}
	}
	if said != 1 {
		t.Errorf("that it asks too often is recorded %d times, want once: %v", said, events)
	}
}
