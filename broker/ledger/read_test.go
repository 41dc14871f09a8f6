package ledger

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/clock"
)

// many is a ledger with n events of which each hundredth is a name.set.
func many(t *testing.T, n int) *Ledger {
	t.Helper()
	l := open(t, t.TempDir(), clock.NewFake())
	_, err := l.Update(t.Context(), func(tx *Tx) error {
		for i := 2; i <= n; i++ {
			e := Event{Type: BrokerStarted, Actor: someone}
			if i%100 == 0 {
				e = Event{Type: NameSet, Actor: someone, Partition: uuid.New(), Data: JSON(NameData{Name: uuid.NewString()})}
			}
			if err := tx.Append(e); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// TestPagesAreBounded reads with a filter that matches rarely: no page looks at
// more than it may, and together they find everything once.
func TestPagesAreBounded(t *testing.T) {
	const n = 5000
	l := many(t, n)
	r := Reading{Filter: EventFilter{Types: []EventType{NameSet}}, Scan: 130, Limit: 10}
	var found []uint64
	pages := 0
	for {
		p, err := l.Read(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		if looked := p.Next - r.After; looked > 130 || looked == 0 {
			t.Fatalf("a page looked at %d events", looked)
		}
		for _, e := range p.Events {
			found = append(found, e.Seq)
		}
		pages++
		if !p.More {
			if p.Next != n {
				t.Errorf("the last page ends at %d", p.Next)
			}
			break
		}
		r.After = p.Next
	}
	if len(found) != n/100 || pages != (n+129)/130 {
		t.Errorf("%d events in %d pages", len(found), pages)
	}
	for i, seq := range found {
		if seq != uint64(i+1)*100 {
			t.Fatalf("event %d is number %d", i, seq)
		}
	}
	// A page ends with its last event when that is what it may hold, not behind it.
	p, err := l.Read(t.Context(), Reading{Limit: 2, Scan: 1000, Filter: r.Filter})
	if err != nil || len(p.Events) != 2 || p.Next != 200 || !p.More {
		t.Errorf("%d events, next %d, more %v, %v", len(p.Events), p.Next, p.More, err)
	}
	p, err = l.Read(t.Context(), Reading{Bytes: 1000, Records: true})
	if err != nil || len(p.Events) < 2 || len(p.Events) > 16 || len(p.Records) != len(p.Events) || !p.More {
		t.Errorf("a page of 1000 bytes holds %d events and %d records, %v", len(p.Events), len(p.Records), err)
	}
	for i, rec := range p.Records {
		if hashRecord(rec) != p.Events[i].Hash {
			t.Errorf("the record of event %d is another's", p.Events[i].Seq)
		}
	}
}

func TestCursors(t *testing.T) {
	l := many(t, 300)
	p, err := l.Read(t.Context(), Reading{After: 300})
	if err != nil || len(p.Events) != 0 || p.Next != 300 || p.More {
		t.Errorf("at the head: %+v, %v", p, err)
	}
	if _, err := l.Read(t.Context(), Reading{After: 301}); !errors.Is(err, ErrBeyondHead) {
		t.Errorf("beyond the head: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.Read(ctx, Reading{}); !errors.Is(err, context.Canceled) {
		t.Errorf("of a reader that went away: %v", err)
	}
}

func TestFilters(t *testing.T) {
	fake := clock.NewFake()
	l := open(t, t.TempDir(), fake)
	start := fake.Now().Wall
	vm, uid, other := uuid.New(), uint32(1000), uint32(1001)
	for i, actor := range []Actor{
		{Kind: ActorPerson, UID: &uid}, {Kind: ActorPerson, UID: &other}, {Kind: ActorVM, VM: vm}, {Kind: ActorBroker},
	} {
		put(t, l, Event{Type: TokenRefused, Actor: actor, VM: holder, Data: JSON(map[string]int{"n": i})})
		fake.Advance(time.Minute)
	}
	since := func(d time.Duration) time.Time { return start.Add(d) }
	for name, c := range map[string]struct {
		f    EventFilter
		want []uint64
	}{
		"kind":      {EventFilter{Actor: ActorFilter{Kind: ActorPerson}}, []uint64{2, 3}},
		"uid":       {EventFilter{Actor: ActorFilter{UID: &uid}}, []uint64{2}},
		"actor vm":  {EventFilter{Actor: ActorFilter{VM: vm}}, []uint64{4}},
		"vm":        {EventFilter{VM: vm}, []uint64{4}},
		"holder":    {EventFilter{VM: holder}, []uint64{2, 3, 4, 5}},
		"since":     {EventFilter{Since: since(2 * time.Minute)}, []uint64{4, 5}},
		"until":     {EventFilter{Until: since(2 * time.Minute), Types: []EventType{TokenRefused}}, []uint64{2, 3}},
		"also":      {EventFilter{Also: func(e Event) bool { return string(e.Data) == `{"n":2}` }}, []uint64{4}},
		"also last": {EventFilter{VM: vm, Also: func(e Event) bool { return e.VM == holder && e.Actor.VM == vm }}, []uint64{4}},
	} {
		events, err := l.Events(0, c.f, 0)
		if err != nil || len(events) != len(c.want) {
			t.Errorf("%s: %d events, %v", name, len(events), err)
			continue
		}
		for i, e := range events {
			if e.Seq != c.want[i] {
				t.Errorf("%s: event %d is number %d, want %d", name, i, e.Seq, c.want[i])
			}
		}
	}
}

// TestObserve is told of every commit, and of what failed.
func TestObserve(t *testing.T) {
	var seen []Commit
	l, err := Open(t.Context(), Options{Dir: t.TempDir(), Kinds: testKinds, Clock: clock.NewFake(), Observe: func(c Commit) { seen = append(seen, c) }})
	if err != nil {
		t.Fatal(err)
	}
	put(t, l, Event{Type: BrokerStarted, Actor: someone}, Event{Type: BrokerStopped, Actor: someone})
	if err := try(l, Event{Type: "nonsense", Actor: someone}); err == nil {
		t.Error("nonsense was recorded")
	}
	if l.Size() < 4096 {
		t.Errorf("it takes %d bytes", l.Size())
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if len(seen) != 1 || len(seen[0].Events) != 2 || seen[0].Err != nil || seen[0].Took <= 0 {
		t.Errorf("it was told %+v", seen)
	}
}
