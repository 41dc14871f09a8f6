package cli_test

import (
	"context"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
)

// busy is the trouble of what is tried again.
func busy() *api.Trouble {
	next := time.Now().Add(time.Hour)
	return &api.Trouble{Verb: "apply", Since: time.Now().Add(-time.Minute), Attempts: 7, Next: &next, Error: "the VM's shim does not answer"}
}

// Plan has a step for each grant that is tried again, and a wait for each other
// one that is pending.
func (f *fake) Plan(_ context.Context, ref string) (api.Plan, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := api.Plan{At: time.Now()}
	for _, v := range f.vms {
		if ref != "" {
			found, err := f.vm(ref)
			if err != nil {
				return api.Plan{}, err
			}
			if found.ID != v.ID {
				continue
			}
		}
		p := api.VMPlan{VM: v.ID, Name: v.Name}
		for _, g := range f.grants {
			s := api.PlanStep{
				Verb: "apply", Kind: "fs", Object: "fs-" + g.ID.String(), Generation: 1, Grants: []uuid.UUID{g.ID}, Spoken: g.Spoken,
				Label: g.Label, Why: "a live grant needs it", Trouble: g.Trouble,
			}
			switch {
			case g.Holder != v.ID || g.State != api.GrantPending:
			case g.Trouble != nil:
				p.Steps = append(p.Steps, s)
			default:
				s.Verb, s.Why = "wait", "its VM does not run"
				p.Waits = append(p.Waits, s)
			}
		}
		if len(p.Steps)+len(p.Waits) > 0 {
			out.VMs = append(out.VMs, p)
		}
	}
	return out, nil
}
