package broker

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
)

// limiting allows everything, limited to that.
func limiting(limits string) string {
	return allowsAll + "\nlimits contains {" + limits + "}\n"
}

// Of what can be granted, only uses are counted. A limit that cannot be kept
// refuses the grant, whoever set it and whatever the caller accepts.
func TestLimitsThatNobodyCountsRefuse(t *testing.T) {
	for _, c := range []struct{ limits, named string }{
		{`"max_live": 5`, "max_live"},
		{`"max_total": 1000000`, "max_total"},
		{`"max_total": 2, "max_uses": 3, "ttl_seconds": 60`, "max_total"},
		{`"max_live": 2, "max_total": 3, "max_uses": 4, "max_depth": 1`, "max_live, max_total"},
	} {
		for who, policies := range map[string][2]string{
			"host":      {limiting(c.limits), allowsAll},
			"partition": {allowsAll, limiting(c.limits)},
		} {
			t.Run(who+" "+c.limits, func(t *testing.T) {
				g := newGranting(t, policies[0], policies[1])
				want := fmt.Sprintf("policy limits it by %s, and that of a fs capability cannot be counted", c.named)
				for _, narrower := range []bool{false, true} {
					r := g.asks(mail1, "/docs", func(r *request) { r.narrower = narrower })
					g.refused(r, api.CodeDenied, want, func(e *api.Error) {
						if e.Verdict == nil || e.Verdict.Outcome != api.OutcomeAllow {
							t.Errorf("the refusal does not tell what policy said: %+v", e.Verdict)
						}
					})
				}
				if who == "partition" {
					g.granted(mail2, "/docs") // another partition's VM is not limited
				}
			})
		}
	}
}

// The limits that can be kept narrow the grant, and do not refuse it.
func TestOtherLimitsNarrow(t *testing.T) {
	g := newGranting(t, allowsAll, limiting(`"ttl_seconds": 3600, "max_depth": 1, "read_only": true`))
	got := g.granted(mail1, "/docs")
	if got.Deadline.IsZero() || got.Limits.MaxDepth == nil || *got.Limits.MaxDepth != 1 || got.Limits.MaxUses != nil {
		t.Errorf("deadline %v, limits %+v", got.Deadline, got.Limits)
	}
	g.refused(g.asks(mail1, "/more", func(r *request) { r.narrower = false }), api.CodeNarrower, "for 1h0m0s")
}

func TestMaxDepth(t *testing.T) {
	g := newGranting(t, allowsAll, limiting(`"max_depth": 1`))
	under := func(parent ledger.Grant) func(*request) {
		return func(r *request) { r.parent = &parent }
	}
	first := g.granted(mail1, "/docs")
	second := g.granted(mail1, "/docs/a", under(first))
	if second.Limits.MaxDepth == nil || *second.Limits.MaxDepth != 0 {
		t.Errorf("limits %+v of what was derived once", second.Limits)
	}
	g.refused(g.asks(mail1, "/docs/a/b", under(second)), api.CodeDenied, "its max_depth is used up")
}

func TestMaxGrants(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	g.o.MaxGrants = 2
	first := g.granted(mail1, "/a")
	g.granted(mail1, "/b", persists)
	says := fmt.Sprintf("VM %s holds 2 grants already", mail1)
	g.refused(g.asks(mail1, "/c"), api.CodeNoSlots, says)
	g.refused(g.asks(mail1, "/c", persists), api.CodeNoSlots, says)
	g.refused(g.asks(mail1, "/a/d", func(r *request) { r.parent = &first }), api.CodeNoSlots, says)
	// Whether it is full shows only to whom policy would give something.
	g.granted(mail2, "/c")
	// A refused request keeps no label, and an ended grant no place.
	if _, err := g.revoke(t.Context(), brokerActor, only(first.ID), "test", true); err != nil {
		t.Fatal(err)
	}
	if got := g.granted(mail1, "/c"); got.Label != "c" {
		t.Errorf("the label is %q", got.Label)
	}
	g.refused(g.asks(mail1, "/e"), api.CodeNoSlots, says)
}

// Policy is asked first: whom it denies learns nothing of the holder's grants.
func TestMaxGrantsAfterPolicy(t *testing.T) {
	g := newGranting(t, allowsAll, "package spectrum.grant\n\nallow if input.capability.resource.path == \"/a\"\n")
	g.o.MaxGrants = 1
	g.granted(mail1, "/a")
	g.refused(g.asks(mail1, "/b"), api.CodeDenied, `== "/a" does not hold (allow, p/p.rego:3)`, func(e *api.Error) {
		if strings.Contains(e.Detail, "holds 1 grants") {
			t.Errorf("the refusal says %q", e.Detail)
		}
	})
}

// However many ask at once, no more are granted than there may be.
func TestMaxGrantsAtOnce(t *testing.T) {
	const may, ask = 3, 12
	g := newGranting(t, allowsAll, allowsAll)
	g.o.MaxGrants = may
	errs := make([]error, ask)
	var wg sync.WaitGroup
	for i := range ask {
		r := g.asks(mail1, fmt.Sprintf("/d%d", i))
		wg.Go(func() { _, errs[i] = g.grant(t.Context(), r) })
	}
	wg.Wait()
	made := 0
	for _, err := range errs {
		switch {
		case err == nil:
			made++
		case api.CodeOf(err) != api.CodeNoSlots:
			t.Errorf("refused: %v (%s), want %s", err, api.CodeOf(err), api.CodeNoSlots)
		}
	}
	if made != may || g.count() != may {
		t.Errorf("%d granted, %d on record, want %d", made, g.count(), may)
	}
	if n := len(g.events(ledger.GrantDenied)); n != ask-may {
		t.Errorf("%d refusals are on record, want %d", n, ask-may)
	}
}
