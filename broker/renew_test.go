package broker

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/clock"
	"spectrum-os.org/broker/policy"
)

func seconds(n int64) *int64 { return &n }

func ttl(n int64) func(*request) { return func(r *request) { r.ttl = &n } }

// renewRefused asserts that a renewal is refused with a code and for a reason,
// that the refusal is all there is on record of it, and that the grant is as it
// was.
func (g *granting) renewRefused(id uuid.UUID, ttl *int64, narrower bool, code api.Code, says string) {
	g.t.Helper()
	before, denials := g.look(id), len(g.events(ledger.GrantDenied))
	uid := uint32(1000)
	_, err := g.renew(g.t.Context(), ledger.Actor{Kind: ledger.ActorPerson, UID: &uid}, before, ttl, narrower)
	e, ok := asAPI(err)
	if !ok || e.Code != code || !strings.Contains(e.Detail, says) {
		g.t.Fatalf("error %v (%s); want %s saying %q", err, api.CodeOf(err), code, says)
	}
	after := g.look(id)
	if after.Deadline != before.Deadline || after.State != before.State || after.Generation != before.Generation || !after.Renewed.Equal(before.Renewed) {
		g.t.Errorf("a refused renewal made %+v of %+v", after, before)
	}
	on := g.events(ledger.GrantDenied)
	if len(on) != denials+1 {
		g.t.Fatalf("%d refusals are on record, want one more than %d", len(on), denials)
	}
	last := on[len(on)-1]
	var d struct{ Action, Reason string }
	if err := json.Unmarshal(last.Data, &d); err != nil || d.Action != "renew" || d.Reason != e.Detail || last.Grant != id || last.VM != before.Holder {
		g.t.Errorf("on record is %s about grant %s of VM %s, %v; want %q", last.Data, last.Grant, last.VM, err, e.Detail)
	}
}

func (g *granting) renewed(id uuid.UUID, ttl *int64, narrower bool) ledger.Grant {
	g.t.Helper()
	uid := uint32(1000)
	made, err := g.renew(g.t.Context(), ledger.Actor{Kind: ledger.ActorPerson, UID: &uid}, g.look(id), ttl, narrower)
	if err != nil {
		g.t.Fatal(err)
	}
	return made
}

// endsIn asserts how long a grant lives from now, to the second.
func (g *granting) endsIn(id uuid.UUID, want time.Duration) {
	g.t.Helper()
	left := g.look(id).Deadline.Remaining(clock.System{}.Now())
	if left > want || left < want-20*time.Second {
		g.t.Errorf("it ends in %v, want %v", left, want)
	}
}

// limited allows everything, for as long as the path says.
const limited = `package spectrum.grant

allow := true

limits contains {"ttl_seconds": 600} if contains(input.capability.resource.path, "ten")
limits contains {"ttl_seconds": 60} if {
	contains(input.capability.resource.path, "shrinks")
	input.capability.ttl_seconds > 1000
}
`

func TestRenewMovesTheEnd(t *testing.T) {
	g := newGranting(t, allowsAll, limited)
	made := g.granted(mail1, "/a", ttl(100))
	events := len(g.events())
	got := g.renewed(made.ID, seconds(1000), false)
	g.endsIn(made.ID, 1000*time.Second)
	if got.Generation != made.Generation+1 || got.Renewed.IsZero() || got.State != ledger.Active || !got.Created.Equal(made.Created) {
		t.Errorf("renewed: %+v", got)
	}
	on := g.events()[events:]
	var d struct {
		Deadline struct{ Wall time.Time }
		Decision recordedDecision
	}
	if len(on) != 1 || on[0].Type != ledger.GrantRenewed || on[0].Actor.UID == nil || *on[0].Actor.UID != 1000 {
		t.Fatalf("on record is %v", on)
	}
	if err := json.Unmarshal(on[0].Data, &d); err != nil || !d.Deadline.Wall.Equal(got.Deadline.Wall) || d.Decision.Verdict.Outcome != api.OutcomeAllow || len(d.Decision.Verdict.Answers) == 0 {
		t.Errorf("on record is %s, %v", on[0].Data, err)
	}
	// Without a lifetime it is the last one again.
	g.renewRefused(made.ID, seconds(900), true, api.CodeInvalid, "a renewal never ends it sooner")
	g.renewed(made.ID, nil, false)
	g.endsIn(made.ID, 1000*time.Second)
	if view := g.grantView(g.look(made.ID)); view.Renewed == nil || view.Expires == nil {
		t.Errorf("people see %+v", view)
	}
}

func TestRenewIsRefused(t *testing.T) {
	g := newGranting(t, allowsAll, limited)
	endless, persists := g.granted(mail1, "/a"), g.granted(mail1, "/b", persists)
	g.renewRefused(endless.ID, nil, true, api.CodeConflict, "lasts until its VM exits")
	g.renewRefused(persists.ID, seconds(5), true, api.CodeConflict, "lasts until it is revoked")

	ended := g.granted(mail1, "/c", ttl(100))
	g.append(ledger.NewChange(ledger.GrantRevoking, brokerActor, ended.ID, ledger.Change{}))
	g.renewRefused(ended.ID, nil, true, api.CodeConflict, "is over and cannot be renewed")
	g.awaitState(ended.ID, ledger.Revoked)
	g.renewRefused(ended.ID, nil, true, api.CodeConflict, "is over and cannot be renewed")

	lease := g.granted(mail1, "/d", ttl(100))
	g.renewRefused(lease.ID, seconds(0), true, api.CodeInvalid, "a lifetime of 0 seconds")
	g.renewRefused(lease.ID, seconds(maxTTL+1), true, api.CodeInvalid, "a lifetime of")
	g.renewRefused(lease.ID, seconds(50), false, api.CodeInvalid, "a renewal never ends it sooner")
}

// TestRenewAsksPolicyAgain has the policy change after the grant.
func TestRenewAsksPolicyAgain(t *testing.T) {
	g := newGranting(t, allowsAll, limited)
	plain, ten, shrinks := g.granted(mail1, "/plain", ttl(100)), g.granted(mail1, "/ten", ttl(100)), g.granted(mail1, "/shrinks", ttl(100))
	g.renewRefused(ten.ID, seconds(700), false, api.CodeNarrower, "10m0s instead of 11m40s")
	g.renewed(ten.ID, seconds(700), true)
	g.endsIn(ten.ID, 600*time.Second)
	// What policy leaves is no more than there is: nothing is shortened.
	g.renewRefused(shrinks.ID, seconds(1001), true, api.CodeInvalid, "a renewal never ends it sooner")
	g.renewRefused(shrinks.ID, seconds(1001), false, api.CodeNarrower, "1m0s instead of")

	load := func(rego string) {
		t.Helper()
		_, err := g.engines.Load(t.Context(), policy.PartitionEngine(workID), policy.Sources{Files: map[string][]byte{"p.rego": []byte(rego)}, Dir: "p"})
		if err != nil {
			t.Fatal(err)
		}
	}
	load(allowsAll + "\nlimits contains {\"max_depth\": 1}\n")
	g.renewRefused(plain.ID, seconds(500), true, api.CodeDenied, "policy now limits max_depth to 1")
	load(strings.Replace(allowsAll, "true", "input.action != \"grant\"", 1))
	g.renewRefused(plain.ID, seconds(500), true, api.CodeDenied, "")
	load(allowsAll)
	g.renewed(plain.ID, seconds(500), false)
}

// TestRenewCannotChangeWhatIsGiven: a policy that would now allow reading only
// does not turn one grant into another.
func TestRenewCannotChangeWhatIsGiven(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	made := g.granted(mail1, "/a", ttl(100), func(r *request) {
		c, err := g.kinds.Parse("fs:rw:"+workID.String()+":/a", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.capability = c
	})
	_, err := g.engines.Load(t.Context(), policy.PartitionEngine(workID), policy.Sources{
		Files: map[string][]byte{"p.rego": []byte(allowsAll + "\nlimits contains {\"read_only\": true}\n")}, Dir: "p",
	})
	if err != nil {
		t.Fatal(err)
	}
	g.renewRefused(made.ID, nil, true, api.CodeDenied, "policy now allows only fs:ro:")
}

func TestRenewAndParents(t *testing.T) {
	g := newGranting(t, allowsAll, limited)
	parent := g.granted(mail1, "/a", ttl(300))
	child := g.granted(mail1, "/a/b", ttl(100), func(r *request) { r.parent = &parent })
	g.renewRefused(child.ID, seconds(1000), false, api.CodeNarrower, "derives from "+parent.ID.String()+", which ends at "+hostTime(parent.Deadline.Wall).Format(time.RFC3339))
	got := g.renewed(child.ID, seconds(1000), true)
	if got.Deadline.Wall.After(parent.Deadline.Wall) || got.Deadline.Wall.Before(parent.Deadline.Wall.Add(-time.Second)) {
		t.Errorf("it ends at %v, and its parent at %v", got.Deadline.Wall, parent.Deadline.Wall)
	}
	g.renewRefused(child.ID, seconds(1000), true, api.CodeConflict, "with "+parent.ID.String())
	// Nobody extends what derives from what is renewed.
	before := g.look(child.ID)
	g.renewed(parent.ID, seconds(5000), false)
	if after := g.look(child.ID); after.Deadline != before.Deadline {
		t.Errorf("renewing its parent made %v of %v", after.Deadline, before.Deadline)
	}
	g.renewed(child.ID, seconds(1000), false)
	g.endsIn(child.ID, 1000*time.Second)
	g.append(ledger.NewChange(ledger.GrantRevoking, brokerActor, parent.ID, ledger.Change{}))
	g.renewRefused(child.ID, seconds(2000), true, api.CodeConflict, "is over and cannot be renewed")
}

// TestRenewRacesTheEnd has grants end, in each way there is, while policy
// thinks.
func TestRenewRacesTheEnd(t *testing.T) {
	g := newGranting(t, allowsAll, limited)
	for name, end := range map[string]func(id uuid.UUID){
		"revoked": func(id uuid.UUID) {
			g.append(ledger.NewChange(ledger.GrantRevoking, brokerActor, id, ledger.Change{}))
		},
		"its run is over": func(uuid.UUID) {
			g.append(ledger.Event{Type: ledger.VMExited, Actor: brokerActor, VM: mail1, Data: ledger.JSON(ledger.RunData{Instance: "run-1"})})
		},
	} {
		t.Run(name, func(t *testing.T) {
			made := g.granted(mail1, "/"+strings.ReplaceAll(name, " ", "-"), ttl(100))
			stale := g.look(made.ID)
			end(made.ID)
			_, err := g.renew(t.Context(), brokerActor, stale, nil, true)
			if e, ok := asAPI(err); !ok || e.Code != api.CodeConflict {
				t.Errorf("%v (%s)", err, api.CodeOf(err))
			}
			if n := len(g.events(ledger.GrantRenewed)); n != 0 {
				t.Errorf("%d renewals are on record", n)
			}
		})
		g.append(ledger.Event{Type: ledger.VMStarted, Actor: brokerActor, VM: mail1, Data: ledger.JSON(ledger.RunData{Instance: "run-1"})})
	}
}

// TestRenewReachesTheWorld wants the answer to come when the VM knows.
func TestRenewReachesTheWorld(t *testing.T) {
	g := newGranting(t, allowsAll, limited)
	made := g.granted(mail1, "/a", ttl(100))
	by := api.Caller{Kind: api.CallerPerson, UID: 1000}
	got, err := g.Renew(t.Context(), by, made.ID.String(), api.RenewRequest{TTLSeconds: seconds(500), Wait: true})
	if err != nil {
		t.Fatal(err)
	}
	g.things.mu.Lock()
	knows := g.things.objects["o-"+made.ID.String()].Generation
	g.things.mu.Unlock()
	if knows != got.Generation || got.Generation != 2 {
		t.Errorf("the grant is in generation %d, and what serves it in %d", got.Generation, knows)
	}
	// A world that does not answer in time is told of, and the renewal stands.
	g.reconciler.Close()
	_, err = g.Renew(t.Context(), by, made.ID.String(), api.RenewRequest{TTLSeconds: seconds(600), Wait: true, TimeoutSeconds: 0.05})
	if e, ok := asAPI(err); !ok || e.Code != api.CodeTimeout || e.Grant == nil || e.Grant.Generation != 3 {
		t.Errorf("%v (%s)", err, api.CodeOf(err))
	}
	if _, err := g.Renew(t.Context(), by, "00000000", api.RenewRequest{}); api.CodeOf(err) != api.CodeNotFound {
		t.Error(err)
	}
}

// TestRenewalsAtOnce: of many at once each is whole, and the latest end counts.
func TestRenewalsAtOnce(t *testing.T) {
	g := newGranting(t, allowsAll, limited)
	made := g.granted(mail1, "/a", ttl(100))
	done := make(chan error)
	ends := []int64{200, 900, 400, 800, 300, 700}
	for _, n := range ends {
		go func() {
			_, err := g.renew(context.Background(), brokerActor, made, &n, false)
			done <- err
		}()
	}
	for range ends {
		if err := <-done; err != nil && api.CodeOf(err) != api.CodeInvalid {
			t.Error(err)
		}
	}
	g.endsIn(made.ID, time.Duration(slices.Max(ends))*time.Second)
}
