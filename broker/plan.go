package broker

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/broker/reconcile"
)

// Plan implements api.Service.
func (b *Broker) Plan(ctx context.Context, ref string) (api.Plan, error) {
	vms := b.holders()
	if ref != "" {
		vm, err := b.resolveVM(ref)
		if err != nil {
			return api.Plan{}, err
		}
		vms = map[uuid.UUID]bool{vm: true}
	}
	out := api.Plan{At: b.o.Clock.Now().Wall, VMs: []api.VMPlan{}}
	var mu sync.Mutex
	// Side by side, so that a VM that does not answer delays only itself.
	var looks errgroup.Group
	looks.SetLimit(32)
	for vm := range vms {
		looks.Go(func() error {
			plan := b.planOf(vm, b.reconciler.Outlook(ctx, vm))
			if len(plan.Steps)+len(plan.Waits)+len(plan.Blind) == 0 {
				return nil
			}
			mu.Lock()
			defer mu.Unlock()
			out.VMs = append(out.VMs, plan)
			return nil
		})
	}
	_ = looks.Wait() // each tells in its plan how it went
	if err := ctx.Err(); err != nil {
		return api.Plan{}, err
	}
	slices.SortFunc(out.VMs, func(x, y api.VMPlan) int {
		return cmp.Or(cmp.Compare(x.Name, y.Name), cmp.Compare(x.VM.String(), y.VM.String()))
	})
	return out, nil
}

func (b *Broker) planOf(vm uuid.UUID, looks []reconcile.Outlook) api.VMPlan {
	out := api.VMPlan{VM: vm, Name: b.vmName(vm), Steps: []api.PlanStep{}, Waits: []api.PlanStep{}}
	for _, look := range looks {
		if look.Blind != nil {
			out.Blind = append(out.Blind, look.Blind.Error())
		}
		for _, s := range look.Steps {
			if s.Verb == reconcile.Wait {
				out.Waits = append(out.Waits, b.planStep(s))
			} else {
				out.Steps = append(out.Steps, b.planStep(s))
			}
		}
	}
	return out
}

func (b *Broker) planStep(s reconcile.Step) api.PlanStep {
	o := s.Object
	out := api.PlanStep{
		Verb: string(s.Verb), Kind: o.Kind, Object: o.ID, Generation: o.Generation, Grants: o.Owners, Label: o.Label,
		Why: s.Why, UnderWay: s.UnderWay,
	}
	if s.Verb.Cuts() {
		out.Grants = s.Ended
	}
	if out.Grants == nil {
		out.Grants = []uuid.UUID{}
	}
	if o.Capability.Resource != nil {
		out.Spoken = b.spoken(o.Capability)
	}
	if s.Trouble != nil {
		t := apiTrouble(*s.Trouble)
		out.Trouble = &t
	}
	return out
}

func apiTrouble(t reconcile.Trouble) api.Trouble {
	out := api.Trouble{Verb: string(t.Verb), Since: t.Since, Attempts: t.Attempts, Error: t.Err.Error()}
	if !t.Next.IsZero() {
		out.Next = &t.Next
	}
	return out
}

// troubleOf is why what a grant stands for cannot be made, or taken away, just
// now.
func (b *Broker) troubleOf(g ledger.Grant) *api.Trouble {
	if g.State.Final() {
		return nil
	}
	for _, o := range b.reconciler.ObjectsOf(g) {
		if t, ok := b.reconciler.TroubleOf(o.ID); ok {
			out := apiTrouble(t)
			return &out
		}
	}
	return nil
}

// becauseOf says what goes wrong, where anything does.
func becauseOf(t *api.Trouble) string {
	if t == nil {
		return ""
	}
	return fmt.Sprintf(": %s (%d tries, it goes on)", t.Error, t.Attempts)
}

// troubleCount says how much does not work just now.
func troubleCount(n map[reconcile.Verb]int) string {
	attach, detach := n[reconcile.Apply]+n[reconcile.Extend], n[reconcile.Withdraw]+n[reconcile.Release]
	return fmt.Sprintf("cannot be made just now: %d objects; cannot be taken away: %d", attach, detach)
}
