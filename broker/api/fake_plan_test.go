package api_test

import (
	"context"
	"reflect"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
)

// thePlan has a step of each sort.
func thePlan() api.Plan {
	next := epoch.Add(4 * time.Second)
	return api.Plan{At: epoch, VMs: []api.VMPlan{{
		VM: mailVM, Name: "work/mail", Blind: []string{"cannot observe fs"},
		Steps: []api.PlanStep{{
			Verb: "withdraw", Kind: "fs", Object: "fs-1", Generation: 2, Grants: []uuid.UUID{otherVM}, Why: "its grant has ended",
			Trouble: &api.Trouble{Verb: "withdraw", Since: epoch, Attempts: 3, Next: &next, Error: "nobody answers"},
		}},
		Waits: []api.PlanStep{{Verb: "wait", Kind: "fs", Object: "fs-2", Generation: 1, Grants: []uuid.UUID{}, Spoken: "fs:ro:work:/a", Label: "a", Why: "its VM does not run"}},
	}}}
}

func (f *fake) Plan(_ context.Context, vm string) (api.Plan, error) {
	err := f.enter("Plan")
	defer f.mu.Unlock()
	switch {
	case err != nil:
		return api.Plan{}, err
	case vm == "" || vm == "mail":
		return thePlan(), nil
	case vm == "idle":
		return api.Plan{At: epoch}, nil
	}
	return api.Plan{}, api.Errorf(api.CodeNotFound, "there is no VM %q", vm)
}

func TestPlan(t *testing.T) {
	h := serveHost(t, api.HostOptions{})
	ctx, c := t.Context(), h.client
	for _, vm := range []string{"", "mail"} {
		if got := must[api.Plan](t)(c.Plan(ctx, vm)); !reflect.DeepEqual(got, thePlan()) {
			t.Errorf("the plan of %q is %+v", vm, got)
		}
	}
	if got := must[api.Plan](t)(c.Plan(ctx, "idle")); got.VMs == nil || len(got.VMs) != 0 {
		t.Errorf("an empty plan is %+v, want an empty list", got)
	}
	_, err := c.Plan(ctx, "nobody")
	wantCode(t, err, api.CodeNotFound)
}
