package ledger

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"pgregory.net/rapid"

	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
)

// TestPrefixed finds grants by their first digits, also beyond what is looked at
// at once, and those that have ended.
func TestPrefixed(t *testing.T) {
	l := open(t, t.TempDir(), clock.NewFake())
	var ids []uuid.UUID
	for len(ids) < prefixStep+100 {
		_, err := l.Update(context.Background(), func(tx *Tx) error {
			for range 8192 {
				ids = append(ids, uuid.New())
				if err := tx.Append(NewGrant(someone, ids[len(ids)-1], holder, partition, GrantRecord{Capability: anything})); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	put(t, l, NewChange(GrantFailed, someone, ids[3], Change{}))
	find := func(digits string) (out []uuid.UUID, looks int) {
		for at, more := 0, true; more; more = at > 0 {
			looks++
			l.View(func(s *State) {
				var some []uuid.UUID
				some, at = s.Prefixed(digits, at)
				out = append(out, some...)
			})
		}
		return out, looks
	}
	for _, i := range []int{0, 3, prefixStep - 1, prefixStep, len(ids) - 1} {
		for _, digits := range []int{8, 9, 13, 36} {
			got, looks := find(ids[i].String()[:digits])
			if !slices.Contains(got, ids[i]) || looks != 2 {
				t.Errorf("grant %d by %d digits: %v in %d looks", i, digits, got, looks)
			}
		}
	}
	for _, digits := range []string{"", "a", "zz", "ABCDEFAB", ids[0].String() + "0", "../../.."} {
		if got, _ := find(digits); len(got) > 0 {
			t.Errorf("%q finds %v", digits, got)
		}
	}
}

// TestHoldsDead is the same as to ask of each grant of a holder whether it is live.
func TestHoldsDead(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		fake := clock.NewFake()
		l := open(t, t.TempDir(), fake)
		defer l.Close()
		holders := []uuid.UUID{uuid.New(), uuid.New()}
		var ids []uuid.UUID
		for range rapid.IntRange(1, 25).Draw(rt, "steps") {
			_, _ = l.Update(context.Background(), func(tx *Tx) error { // what is refused changes nothing
				if len(ids) == 0 || rapid.Bool().Draw(rt, "grant") {
					r := GrantRecord{Capability: anything, Persist: true}
					if len(ids) > 0 && rapid.Bool().Draw(rt, "derived") {
						r.Parent = rapid.SampledFrom(ids).Draw(rt, "parent")
					}
					if rapid.Bool().Draw(rt, "lease") {
						r.Deadline = capabilities.Deadline{Wall: fake.Now().Wall.Add(time.Duration(rapid.IntRange(1, 3).Draw(rt, "hours")) * time.Hour)}
					}
					id := uuid.New()
					err := tx.Append(NewGrant(someone, id, rapid.SampledFrom(holders).Draw(rt, "holder"), partition, r))
					if err == nil {
						ids = append(ids, id)
					}
					return err
				}
				move := rapid.SampledFrom([]EventType{GrantActive, GrantFailed, GrantRevoking, GrantRevoked}).Draw(rt, "move")
				return tx.Append(NewChange(move, someone, rapid.SampledFrom(ids).Draw(rt, "which"), Change{}))
			})
			if rapid.Bool().Draw(rt, "time") {
				fake.Advance(time.Hour)
			}
			l.View(func(s *State) {
				for _, h := range holders {
					want := false
					for held := range s.Held(h) {
						want = want || s.Live(held.ID, fake.Now()) != nil
					}
					if got := s.HoldsDead(h, fake.Now()); got != want {
						rt.Fatalf("HoldsDead is %v, and one by one it is %v", got, want)
					}
				}
			})
		}
	})
}
