package broker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/policy"
	"spectrum-os.org/broker/sources"
)

// mail3 is a second VM of the partition work, and mail4 one that does not run.
var (
	mail3 = uuid.MustParse("aaaaaaaa-0000-4000-8000-00000000cc01")
	mail4 = uuid.MustParse("aaaaaaaa-0000-4000-8000-00000000cc02")
)

// delegating is a broker whose guests can call it.
func newDelegating(t *testing.T, host, work string) *granting {
	t.Helper()
	g := newGranting(t, host, work)
	g.quotas.perMinute, g.quotas.burst = 6000, 1000
	g.ready.Store(true)
	inv := *g.inv()
	inv.definitions[mail3] = sources.Definition{ID: mail3, Partition: workID, Alias: "third", Aliases: []string{"third"}}
	inv.definitions[mail4] = sources.Definition{ID: mail4, Partition: workID, Alias: "fourth", Aliases: []string{"fourth"}}
	g.inventory.Store(&inv)
	for _, vm := range []uuid.UUID{mail3, mail4} {
		g.append(ledger.Event{Type: ledger.VMBound, Actor: brokerActor, VM: vm, Partition: workID})
	}
	g.run(mail3, "run-1")
	return g
}

// calls is one request of a guest on its own socket.
func (g *granting) calls(vm uuid.UUID, method, path string, body any) *httptest.ResponseRecorder {
	g.t.Helper()
	var sent bytes.Buffer
	if body != nil {
		if err := json.NewEncoder(&sent).Encode(body); err != nil {
			g.t.Fatal(err)
		}
	}
	r := httptest.NewRequest(method, path, &sent)
	r.Header.Set("Content-Type", "application/json")
	w := httptest.NewRecorder()
	api.NewGuestHandler(guestService{g.Broker}, vm, api.GuestOptions{}).ServeHTTP(w, r)
	return w
}

func (g *granting) delegates(vm uuid.UUID, d api.GuestDelegation) *httptest.ResponseRecorder {
	g.t.Helper()
	return g.calls(vm, http.MethodPost, "/v1/delegations", d)
}

// delegated is a delegation that is accepted.
func (g *granting) delegated(vm uuid.UUID, d api.GuestDelegation) ledger.Grant {
	g.t.Helper()
	w := g.delegates(vm, d)
	var made api.GuestGrant
	if err := json.Unmarshal(w.Body.Bytes(), &made); err != nil || w.Code != http.StatusCreated {
		g.t.Fatalf("%d %s", w.Code, w.Body)
	}
	return g.look(made.ID)
}

// passedOn is a grant that a person delegates.
func (g *granting) passedOn(parent ledger.Grant, to uuid.UUID, path string, change ...func(*request)) ledger.Grant {
	g.t.Helper()
	return g.granted(to, path, append([]func(*request){func(r *request) {
		r.parent = &parent
		c, err := g.kinds.Parse("fs:ro:"+workID.String()+":"+path, nil)
		if err != nil {
			g.t.Fatal(err)
		}
		r.capability = c
	}}, change...)...)
}

// What is delegated is asked of policy as that, with the parent in the input,
// and of the partition of whose grant it is.
func TestDelegatingAsksThePartitionOfTheParentsHolder(t *testing.T) {
	const noDelegation = "package spectrum.grant\n\nallow if input.action != \"delegate\"\n\n" +
		"allow if {\n\tinput.action == \"delegate\"\n\tinput.parent.resource.path == \"/open\"\n}\n"
	g := newDelegating(t, allowsAll, noDelegation)
	// Of the partition home, held by a VM of work: delegated to a VM of home, work
	// is concerned only as the partition of the parent's holder.
	home := func(path string, change ...func(*request)) func(*request) {
		return func(r *request) {
			c, err := g.kinds.Parse("fs:ro:"+homeID.String()+":"+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			r.capability = c
			for _, f := range change {
				f(r)
			}
		}
	}
	closed, opened := g.granted(mail1, "/x", home("/closed")), g.granted(mail1, "/x", home("/open"))
	under := func(p ledger.Grant) func(*request) { return func(r *request) { r.parent = &p } }
	r := g.asks(mail2, "/x", home("/closed/a", under(closed)))
	g.refused(r, api.CodeDenied, "", func(e *api.Error) {
		if e.Verdict == nil || !slices.ContainsFunc(e.Verdict.Answers, func(a api.Answer) bool {
			return a.Engine == workID.String() && a.Outcome == api.OutcomeDeny
		}) {
			t.Errorf("work did not refuse it: %+v", e.Verdict)
		}
	})
	got := g.granted(mail2, "/x", home("/open/a", under(opened)))
	if got.Parent != opened.ID || got.Holder != mail2 {
		t.Errorf("%+v", got)
	}
	var d recordedDecision
	if err := json.Unmarshal(got.Decision, &d); err != nil || len(d.Verdict.Answers) != 3 {
		t.Errorf("asked were %+v, want the host, work and home", d.Verdict.Answers)
	}
	// Attenuating what one holds oneself is no delegation.
	if got := g.granted(mail1, "/x", home("/closed/b", under(closed))); got.Holder != mail1 {
		t.Errorf("%+v", got)
	}
}

// The same words, and as long, for all that a guest may not tell apart.
func TestGuestCannotProbe(t *testing.T) {
	const policies = "package spectrum.grant\n\nallow if input.action != \"delegate\"\n\nallow if input.requester.kind == \"person\"\n\n" +
		"allow if input.capability.resource.path == \"/docs/open\"\n"
	g := newDelegating(t, allowsAll, policies)
	from := g.granted(mail3, "/docs")
	mine := g.passedOn(from, mail1, "/docs")
	missing := uuid.New()
	quiet := g.granted(mail1, "/docs/quiet")
	var bodies []string
	for name, d := range map[string]api.GuestDelegation{
		"a VM that does not exist":               {Grant: mine.ID.String(), To: missing.String()},
		"a VM that it was not introduced to":     {Grant: mine.ID.String(), To: mail2.String()},
		"one that does not run either":           {Grant: mine.ID.String(), To: mail4.String()},
		"what policy refuses to one it knows":    {Grant: quiet.ID.String(), To: mail3.String()},
		"and to one that it does not know":       {Grant: quiet.ID.String(), To: missing.String()},
		"a label that is taken in the other one": {Grant: mine.ID.String(), To: mail3.String(), Label: from.Label, Capability: "fs:ro:" + workID.String() + ":/docs/open"},
	} {
		denials := len(g.events(ledger.GrantDenied))
		began := time.Now()
		w := g.delegates(mail1, d)
		if took := time.Since(began); took < refusalStep {
			t.Errorf("%s: refused after %v, before others are", name, took)
		}
		if w.Code != http.StatusForbidden {
			t.Errorf("%s: %d %s", name, w.Code, w.Body)
		}
		bodies = append(bodies, fmt.Sprint(w.Code, w.Header(), w.Body))
		on := g.events(ledger.GrantDenied)
		if len(on) != denials+1 || on[len(on)-1].Actor.VM != mail1 || on[len(on)-1].VM.String() != d.To {
			t.Errorf("%s: %d refusals are on record", name, len(on)-denials)
		}
	}
	if bodies = slices.Compact(bodies); len(bodies) != 1 {
		t.Errorf("answers tell cases apart: %q", bodies)
	}
	// One that it knows and that has ended, so that it does not run.
	g.vanish(mail3)
	g.append(ledger.Event{Type: ledger.VMExited, Actor: brokerActor, VM: mail3, Data: ledger.JSON(ledger.RunData{Instance: "run-1"})})
	w := g.delegates(mail1, api.GuestDelegation{Grant: mine.ID.String(), To: mail3.String(), Capability: "fs:ro:" + workID.String() + ":/docs/open"})
	if got := fmt.Sprint(w.Code, w.Header(), w.Body); got != bodies[0] {
		t.Errorf("a VM that it knows and that has stopped: %s, want %s", got, bodies[0])
	}
}

// What a guest got wrong about its own grant it is told, whoever it is for, and
// nothing is granted.
func TestGuestDelegatesWider(t *testing.T) {
	g := newDelegating(t, allowsAll, allowsAll)
	from := g.granted(mail3, "/docs")
	mine := g.passedOn(from, mail1, "/docs/mine", func(r *request) {
		one, four := 1, 4
		r.limits = ledger.Limits{MaxUses: &four, MaxDepth: &one}
	})
	others := g.granted(mail2, "/theirs")
	ended := g.granted(mail1, "/ended")
	if _, err := g.revoke(t.Context(), brokerActor, only(ended.ID), "test", true); err != nil {
		t.Fatal(err)
	}
	tokenOf := func(x ledger.Grant) string {
		token, _, err := g.mint(t.Context(), brokerActor, x)
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	five, one := 5, 1
	spelt := func(s string) string { return strings.ReplaceAll(s, "W", workID.String()) }
	for name, c := range map[string]struct {
		d    api.GuestDelegation
		code api.Code
		says string
	}{
		"a wider path":          {api.GuestDelegation{Grant: mine.ID.String(), Capability: spelt("fs:ro:W:/docs")}, api.CodeInvalid, "is not covered by"},
		"a right more":          {api.GuestDelegation{Grant: mine.ID.String(), Capability: spelt("fs:rw:W:/docs/mine")}, api.CodeInvalid, "is not covered by"},
		"another partition":     {api.GuestDelegation{Grant: mine.ID.String(), Capability: "fs:ro:" + homeID.String() + ":/docs/mine"}, api.CodeInvalid, "is not covered by"},
		"a partition's petname": {api.GuestDelegation{Grant: mine.ID.String(), Capability: "fs:ro:work:/docs/mine"}, api.CodeInvalid, "is not covered by"},
		"more uses":             {api.GuestDelegation{Grant: mine.ID.String(), MaxUses: &five}, api.CodeInvalid, "at most 4"},
		"deeper":                {api.GuestDelegation{Grant: mine.ID.String(), MaxDepth: &one}, api.CodeInvalid, "at most 0"},
		"to itself":             {api.GuestDelegation{Grant: mine.ID.String(), To: mail1.String()}, api.CodeInvalid, "does not delegate to itself"},
		"another's grant":       {api.GuestDelegation{Grant: others.ID.String()}, api.CodeInvalid, "is none that this VM holds"},
		"a grant that is not":   {api.GuestDelegation{Grant: uuid.NewString()}, api.CodeInvalid, "is none that this VM holds"},
		"after its revocation":  {api.GuestDelegation{Grant: ended.ID.String()}, api.CodeInvalid, "is none that this VM holds"},
		"another's token":       {api.GuestDelegation{Token: tokenOf(others)}, api.CodeTokenRefused, ""},
		"a revoked one's token": {api.GuestDelegation{Token: tokenOf(ended)}, api.CodeTokenRefused, ""},
		"a token that is none":  {api.GuestDelegation{Token: "bm9uZQ"}, api.CodeTokenRefused, ""},
		"both":                  {api.GuestDelegation{Grant: mine.ID.String(), Token: tokenOf(mine)}, api.CodeInvalid, "exactly one of grant and token"},
		"neither":               {api.GuestDelegation{}, api.CodeInvalid, "exactly one of grant and token"},
		"no use at all":         {api.GuestDelegation{Grant: mine.ID.String(), MaxUses: new(int)}, api.CodeInvalid, "between 1 and"},
	} {
		for _, to := range []uuid.UUID{mail3, mail2, uuid.New()} {
			d := c.d
			if d.To == "" {
				d.To = to.String()
			}
			before := g.count()
			w := g.delegates(mail1, d)
			var p api.Problem
			if err := json.Unmarshal(w.Body.Bytes(), &p); err != nil || p.Code != c.code || !strings.Contains(p.Detail, c.says) {
				t.Errorf("%s, to %s: %d %s", name, to, w.Code, w.Body)
			}
			if n := g.count(); n != before {
				t.Errorf("%s: something was granted", name)
			}
		}
	}
	// The one that is right, by its id and by its token.
	for _, d := range []api.GuestDelegation{{Grant: mine.ID.String()}, {Token: tokenOf(mine)}} {
		d.To = mail3.String()
		got := g.awaitState(g.delegated(mail1, d).ID, ledger.Active)
		if got.Holder != mail3 || got.Parent != mine.ID || *got.Limits.MaxUses != 4 || *got.Limits.MaxDepth != 0 {
			t.Errorf("%+v", got)
		}
		// A ring: what came back is derived from what was given, and no deeper.
		w := g.delegates(mail3, api.GuestDelegation{Grant: got.ID.String(), To: mail1.String()})
		if !strings.Contains(w.Body.String(), "max_depth is used up") {
			t.Errorf("too deep: %d %s", w.Code, w.Body)
		}
	}
}

// A ring of delegations ends with its first one, and is shown to nobody whom it
// does not concern.
func TestRing(t *testing.T) {
	g := newDelegating(t, allowsAll, allowsAll)
	a := g.granted(mail1, "/docs")
	b := g.passedOn(a, mail3, "/docs/b")
	w := g.delegates(mail3, api.GuestDelegation{Grant: b.ID.String(), To: mail1.String(), Capability: "fs:ro:self:/docs/b/a"})
	var made map[string]any
	if err := json.Unmarshal(w.Body.Bytes(), &made); err != nil || w.Code != http.StatusCreated {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	for _, hidden := range []string{"label", "mount_path", "from", "uses"} {
		if v, ok := made[hidden]; ok {
			t.Errorf("the delegator is told %s: %v", hidden, v)
		}
	}
	again := g.awaitState(uuid.MustParse(made["id"].(string)), ledger.Active)
	if again.Holder != mail1 || again.Depth != 2 {
		t.Fatalf("%+v", again)
	}
	// The first one learns who gave it back, and may delegate in turn.
	list := g.calls(mail1, http.MethodGet, "/v1/capabilities", nil)
	if !strings.Contains(list.Body.String(), `"from":"`+mail3.String()+`"`) {
		t.Errorf("%s", list.Body)
	}
	third := g.delegated(mail1, api.GuestDelegation{Grant: again.ID.String(), To: mail3.String()})
	g.awaitState(third.ID, ledger.Active)
	if _, err := g.revoke(t.Context(), brokerActor, only(a.ID), "test", true); err != nil {
		t.Fatal(err)
	}
	for _, id := range []uuid.UUID{a.ID, b.ID, again.ID, third.ID} {
		if got := g.look(id); got.State != ledger.Revoked {
			t.Errorf("grant %s is %s", id, got.State)
		}
		if g.things.has(id) {
			t.Errorf("grant %s still gives access", id)
		}
	}
	// What introduced them is over, and so is the introduction.
	own := g.granted(mail1, "/own")
	if w := g.delegates(mail1, api.GuestDelegation{Grant: own.ID.String(), To: mail3.String()}); w.Code != http.StatusForbidden {
		t.Errorf("to a VM that it knew: %d %s", w.Code, w.Body)
	}
}

// Who delegated may take back what derives from its own grant, and nobody else.
func TestDelegatorTakesBack(t *testing.T) {
	g := newDelegating(t, allowsAll, allowsAll)
	a := g.granted(mail1, "/docs")
	b := g.passedOn(a, mail3, "/docs/b")
	back := g.delegated(mail3, api.GuestDelegation{Grant: b.ID.String(), To: mail1.String()})
	g.awaitState(back.ID, ledger.Active)
	for name, c := range map[string]struct{ vm, id uuid.UUID }{
		"a stranger":           {mail2, b.ID},
		"what it derives from": {mail3, a.ID},
		"what there is not":    {mail3, uuid.New()},
	} {
		if w := g.calls(c.vm, http.MethodDelete, "/v1/capabilities/"+c.id.String(), nil); w.Code != http.StatusNotFound {
			t.Errorf("%s: %d %s", name, w.Code, w.Body)
		}
	}
	if got := g.look(b.ID); got.State != ledger.Active {
		t.Fatalf("it is %s", got.State)
	}
	takesBack := func() string {
		w := g.calls(mail3, http.MethodDelete, "/v1/capabilities/"+back.ID.String(), nil)
		if w.Code != http.StatusAccepted {
			t.Errorf("%d %s", w.Code, w.Body)
		}
		return w.Body.String()
	}
	first := takesBack()
	if got := g.awaitState(back.ID, ledger.Revoked); !strings.Contains(got.Reason, "taken back by VM "+mail3.String()) {
		t.Errorf("it ended because %q", got.Reason)
	}
	// Asking again does not tell for how long the other VM held on.
	if again := takesBack(); again != first {
		t.Errorf("it is told %s, and then %s", first, again)
	}
	if w := g.calls(mail1, http.MethodDelete, "/v1/capabilities/"+b.ID.String(), nil); w.Code/100 != 2 {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	g.awaitState(b.ID, ledger.Revoked)
}

// A token is handed to its holder alone, on record, and not for what is dead or
// used up.
func TestGuestFetchesItsToken(t *testing.T) {
	g := newDelegating(t, allowsAll, limiting(`"max_uses": 1`))
	spent := g.granted(mail1, "/docs")
	free := g.granted(mail2, "/docs")
	fetch := func(vm uuid.UUID, x ledger.Grant) *httptest.ResponseRecorder {
		return g.calls(vm, http.MethodPost, "/v1/capabilities/"+x.ID.String()+"/token", nil)
	}
	w := fetch(mail2, free)
	var token api.Token
	if err := json.Unmarshal(w.Body.Bytes(), &token); err != nil || token.Grant != free.ID || token.Token == "" {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	if on := g.events(ledger.TokenIssued); len(on) != 1 || on[0].Actor.VM != mail2 || on[0].Grant != free.ID {
		t.Errorf("on record: %+v", on)
	}
	if w := fetch(mail1, free); w.Code != http.StatusNotFound {
		t.Errorf("another's: %d %s", w.Code, w.Body)
	}
	if w := fetch(mail1, spent); w.Code != http.StatusConflict {
		t.Errorf("a used-up one: %d %s", w.Code, w.Body)
	}
	// And one that it had before is refused from its last use on.
	text, _, err := g.mint(t.Context(), brokerActor, spent)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (guestService{g.Broker}).ownToken(t.Context(), mail1, text); api.CodeOf(err) != api.CodeTokenRefused || !errors.Is(err, ledger.ErrUsedUp) {
		t.Errorf("a used-up token: %v", err)
	}
	if !g.things.has(spent.ID) {
		t.Error("its last use was taken away")
	}
}

// However a delegation races the revocation of its parent: nothing lives on, and
// nothing is there.
func TestDelegationRacesRevocation(t *testing.T) {
	g := newDelegating(t, allowsAll, allowsAll)
	for round := range 10 {
		a := g.granted(mail3, fmt.Sprintf("/docs%d", round))
		mine := g.passedOn(a, mail1, fmt.Sprintf("/docs%d/x", round))
		var wg sync.WaitGroup
		var mu sync.Mutex
		var made []uuid.UUID
		for range 8 {
			wg.Go(func() {
				x, err := guestService{g.Broker}.Delegate(context.Background(), mail1, api.GuestDelegation{Grant: mine.ID.String(), To: mail3.String()})
				if err != nil {
					return
				}
				mu.Lock()
				defer mu.Unlock()
				made = append(made, x.ID)
			})
		}
		time.Sleep(time.Duration(round) * time.Millisecond)
		if _, err := g.revoke(t.Context(), brokerActor, only(a.ID), "test", false); err != nil {
			t.Fatal(err)
		}
		g.ledger.View(func(s *ledger.State) {
			for _, id := range s.Subtree(a.ID) {
				if s.Live(id, g.o.Clock.Now()) == nil {
					t.Errorf("grant %s lives on", id)
				}
			}
		})
		wg.Wait()
		for _, id := range made {
			if got := g.awaitState(id, ledger.Revoked); g.things.has(got.ID) {
				t.Errorf("grant %s still gives access", id)
			}
		}
	}
}

// A guest cannot fill the ledger with delegations that are refused.
func TestDelegationsThatAreTooMany(t *testing.T) {
	g := newDelegating(t, allowsAll, allowsAll)
	mine := g.granted(mail1, "/docs")
	g.quotas.perMinute, g.quotas.burst = 1, 2
	var last int
	for range 4 {
		last = g.delegates(mail1, api.GuestDelegation{Grant: mine.ID.String(), To: uuid.NewString()}).Code
	}
	if last != http.StatusTooManyRequests || len(g.events(ledger.GrantDenied)) != 2 {
		t.Errorf("the last answer is %d, %d refusals are on record", last, len(g.events(ledger.GrantDenied)))
	}
}

func TestWhy(t *testing.T) {
	g := newDelegating(t, allowsAll, "package spectrum.grant\n\nallow := true\n")
	a := g.granted(mail3, "/docs")
	b := g.passedOn(a, mail1, "/docs/b")
	c := g.delegated(mail1, api.GuestDelegation{Grant: b.ID.String(), To: mail3.String(), Capability: "fs:ro:self:/docs/b/c"})
	got, err := g.Why(t.Context(), c.ID.String())
	if err != nil || len(got.Steps) != 3 {
		t.Fatalf("%+v, %v", got, err)
	}
	for i, want := range []struct {
		id     uuid.UUID
		action string
		actor  string
	}{{c.ID, policy.ActionDelegate, ledger.ActorVM}, {b.ID, policy.ActionDelegate, ledger.ActorPerson}, {a.ID, policy.ActionGrant, ledger.ActorPerson}} {
		step := got.Steps[i]
		if step.Grant.ID != want.id || step.Action != want.action || step.Actor.Kind != want.actor || !step.Live || step.Seq == 0 {
			t.Errorf("step %d: %+v", i, step)
		}
		if step.Grant.Decision == nil || !slices.ContainsFunc(step.Grant.Decision.Answers, func(a api.Answer) bool {
			return slices.ContainsFunc(a.Reasons, func(r api.Reason) bool { return r.File != "" && r.Line > 0 })
		}) {
			t.Errorf("step %d does not name the rule that allowed it: %+v", i, step.Grant.Decision)
		}
	}
	if _, err := g.revoke(t.Context(), brokerActor, only(a.ID), "test", true); err != nil {
		t.Fatal(err)
	}
	if got, err = g.Why(t.Context(), c.ID.String()); err != nil || got.Steps[0].Live || !strings.Contains(got.Steps[0].Dead, "revoked") {
		t.Errorf("%+v, %v", got.Steps[0], err)
	}
}

// Who may delegate to a VM cannot fill it.
func TestDelegatorCannotFillAnotherVM(t *testing.T) {
	g := newDelegating(t, allowsAll, allowsAll)
	g.o.MaxGrants = 12
	from := g.granted(mail3, "/docs")
	mine := g.passedOn(from, mail1, "/docs/mine")
	for range 3 {
		g.delegated(mail1, api.GuestDelegation{Grant: mine.ID.String(), To: mail3.String()})
	}
	if w := g.delegates(mail1, api.GuestDelegation{Grant: mine.ID.String(), To: mail3.String()}); w.Code != http.StatusForbidden {
		t.Errorf("a fourth of twelve: %d %s", w.Code, w.Body)
	}
	on := g.events(ledger.GrantDenied)
	if last := string(on[len(on)-1].Data); !strings.Contains(last, "was delegated 3 grants by VM "+mail1.String()) {
		t.Errorf("on record is %s", last)
	}
	g.granted(mail3, "/own")
}

// Who drops what it passed on is not told how long the other VM holds on, and does
// not wait for that.
func TestDropDoesNotWaitForAnotherVM(t *testing.T) {
	g := newDelegating(t, allowsAll, allowsAll)
	a := g.granted(mail1, "/docs")
	b := g.passedOn(a, mail3, "/docs/b")
	stuck := make(chan struct{})
	g.things.mu.Lock()
	g.things.stuck, g.things.stuckIn = stuck, mail3
	g.things.mu.Unlock()
	answer := make(chan *httptest.ResponseRecorder, 1)
	go func() { answer <- g.calls(mail1, http.MethodDelete, "/v1/capabilities/"+a.ID.String(), nil) }()
	select {
	case w := <-answer:
		if w.Code != http.StatusOK || !strings.Contains(w.Body.String(), `"revoked"`) {
			t.Errorf("%d %s", w.Code, w.Body)
		}
	case <-time.After(20 * time.Second):
		t.Error("it waits for the other VM")
	}
	if got := g.look(b.ID); got.State.Final() {
		t.Errorf("what the other VM still has is %s", got.State)
	}
	close(stuck)
	g.awaitState(b.ID, ledger.Revoked)
}

// Who asks for longer than the parent lasts is told, and takes what is left only
// if they say so.
func TestDelegatedForLongerThanTheParentLasts(t *testing.T) {
	g := newDelegating(t, allowsAll, allowsAll)
	minute, hour := int64(60), int64(3600)
	parent := g.granted(mail1, "/docs", func(r *request) { r.ttl = &minute })
	r := g.asks(mail3, "/docs/a", func(r *request) { r.parent, r.ttl, r.narrower = &parent, &hour, false })
	g.refused(r, api.CodeNarrower, "sooner than 1h0m0s from now")
	r.narrower = true
	got, err := g.grant(t.Context(), r)
	if err != nil || !narrowed(got) || got.Deadline.Wall.After(parent.Deadline.Wall) {
		t.Errorf("%v, narrowed: %v, until %v", err, narrowed(got), got.Deadline.Wall)
	}
	// As long as the parent lasts, without a number, is all that was asked for.
	r.ttl, r.narrower, r.label = nil, false, "other"
	if got, err := g.grant(t.Context(), r); err != nil || narrowed(got) || got.Deadline.IsZero() {
		t.Errorf("%v, narrowed: %v, until %v", err, narrowed(got), got.Deadline.Wall)
	}
}
