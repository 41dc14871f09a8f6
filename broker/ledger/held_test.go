package ledger

import (
	"context"
	"slices"
	"testing"

	"github.com/google/uuid"

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
