package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/capabilities"
)

// requestFlags are those that describe a request, for grant and explain.
type requestFlags struct {
	ttl, label, parent string
	persist            bool
}

func (r *requestFlags) register(cmd *cobra.Command, a *app) {
	r.registerLease(cmd)
	cmd.Flags().StringVar(&r.parent, "parent", "", "derive it from this `grant`, and end it with that; where another VM holds that one, this delegates it")
	_ = cmd.RegisterFlagCompletionFunc("parent", a.completeGrant)
}

// registerLease registers those that say nothing of where it comes from.
func (r *requestFlags) registerLease(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&r.ttl, "ttl", "", "end it after this `duration`, such as 90s, 1h or 7d (default: with the VM's exit; with --persist, when revoked)")
	f.StringVar(&r.label, "as", "", "`label` under which the guest mounts it, at /run/spectrum/fs/LABEL")
	f.BoolVar(&r.persist, "persist", false, "keep it when the VM exits, and give it again at the next start")
	_ = cmd.RegisterFlagCompletionFunc("as", cobra.NoFileCompletions)
	_ = cmd.RegisterFlagCompletionFunc("ttl", cobra.NoFileCompletions)
}

func (r *requestFlags) request(vm, capability string) (api.GrantRequest, error) {
	req := api.GrantRequest{VM: vm, Capability: capability, Label: r.label, Parent: r.parent, Persist: r.persist}
	var err error
	req.TTLSeconds, err = parseTTL(r.ttl)
	return req, err
}

// parseTTL reads --ttl in seconds, nil where it is not given.
func parseTTL(ttl string) (*int64, error) {
	if ttl == "" {
		return nil, nil //nolint:nilnil // not given
	}
	d, err := parseDuration("--ttl", ttl)
	if err != nil {
		return nil, err
	}
	if d < time.Second || d%time.Second != 0 {
		return nil, usage("--ttl %s: it is not whole seconds", ttl)
	}
	s := int64(d / time.Second)
	return &s, nil
}

// waitFlags are those of what takes effect in the world.
type waitFlags struct {
	wait, noWait bool
	timeout      string
}

func (w *waitFlags) register(f *pflag.FlagSet, until string) {
	f.BoolVar(&w.wait, "wait", true, "return "+until)
	f.BoolVar(&w.noWait, "no-wait", false, "return as soon as it is on record")
	f.StringVar(&w.timeout, "timeout", "", "wait no longer than this `duration` (default: the broker's)")
}

func (w *waitFlags) read(cmd *cobra.Command) (wait bool, timeout time.Duration, err error) {
	if w.noWait && w.wait && cmd.Flags().Changed("wait") {
		return false, 0, usage("--wait and --no-wait exclude each other")
	}
	if w.timeout != "" {
		if timeout, err = parseDuration("--timeout", w.timeout); err != nil {
			return false, 0, err
		}
	}
	return w.wait && !w.noWait, timeout, nil
}

// withTimeout is within for a flag.
func withTimeout(ctx context.Context, timeout string) (context.Context, context.CancelFunc, error) {
	if timeout == "" {
		ctx, cancel := context.WithCancel(ctx)
		return ctx, cancel, nil
	}
	d, err := parseDuration("--timeout", timeout)
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, d)
	return ctx, cancel, nil
}

func (a *app) grantCommand() *cobra.Command {
	var (
		what     requestFlags
		limits   limitFlags
		waiting  waitFlags
		narrower bool
		quiet    bool
	)
	cmd := &cobra.Command{
		Use:   "grant VM CAPABILITY",
		Short: "Give a VM a capability, if policy allows",
		Long: `Give a VM a capability, if policy allows. It returns when the guest has it
mounted, and says so if the guest has no agent to mount it.

When policy allows less than was asked (a shorter time, or reading only), that
is refused with exit code 8 unless --accept-narrower is given.`,
		Example: `  spectrum-cap grant work/mail fs:ro:work:/invoices --ttl 1h --as invoices
  spectrum-cap grant work/mail fs:rw:work:/outbox/today.txt --persist
  spectrum-cap grant mail fs:rw:work:/outbox --accept-narrower --timeout 10s
  spectrum-cap grant work/mail fs:ro:work:/invoices --persist --max-uses 2
  id=$(spectrum-cap grant work/mail fs:ro:work:/invoices --quiet)`,
		Args:              args(2, 2, "a VM and a capability"),
		ValidArgsFunction: a.completeRequest,
		RunE: func(cmd *cobra.Command, got []string) error {
			req, err := what.request(got[0], got[1])
			if err != nil {
				return err
			}
			if err := limits.read(cmd, &req); err != nil {
				return err
			}
			wait, timeout, err := waiting.read(cmd)
			if err != nil {
				return err
			}
			req.AcceptNarrower, req.Wait, req.TimeoutSeconds = narrower, wait, timeout.Seconds()
			ctx, cancel := within(cmd.Context(), timeout)
			defer cancel()
			end := a.progress("waiting until %s has %s", got[0], got[1])
			g, err := a.broker().Grant(ctx, req)
			end()
			if err != nil {
				return err
			}
			return a.granted(g, quiet)
		},
	}
	what.register(cmd, a)
	limits.register(cmd.Flags())
	waiting.register(cmd.Flags(), "when the guest has it")
	cmd.Flags().BoolVar(&narrower, "accept-narrower", false, "take it even if policy allows less than was asked")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print the grant's UUID only")
	return cmd
}

func (a *app) granted(g api.Grant, quiet bool) error {
	var err error
	if quiet && a.output == "table" {
		_, err = fmt.Fprintln(a.host.Stdout, g.ID)
	} else {
		err = a.print(g, func(w io.Writer) { a.grantFacts(g, false).write(w) })
	}
	if err != nil {
		return err
	}
	if g.Narrowed {
		a.note("policy allows less than was asked: this is %s, and it ends %s", g.Spoken, a.ends(g))
	}
	if g.NoAgent {
		a.note("%s is attached, but the guest has no agent to mount it", g.Spoken)
	}
	if g.Degraded != "" {
		a.note("degraded: %s", g.Degraded)
	}
	switch g.State {
	case api.GrantFailed, api.GrantRevoked, api.GrantRevoking:
		return &codedError{exitFailed, fmt.Sprintf("the grant is %s: %s", g.State, orElse(g.Reason, "the broker does not say why"))}
	}
	return nil
}

// grantFacts describe one grant; all of them, or what its maker does not know.
func (a *app) grantFacts(g api.Grant, all bool) facts {
	var f facts
	f.add("Grant", g.ID.String())
	f.add("Holder", holderText(g))
	f.add("Capability", orElse(g.Spoken, g.Spelling))
	if all && g.Spoken != "" && g.Spoken != g.Spelling {
		f.add("In full", g.Spelling)
	}
	f.add("Label", g.Label)
	f.add("State", string(g.State))
	f.add("Reason", g.Reason)
	if g.Trouble != nil {
		f.add("Trouble", troubleText(*g.Trouble, a.now()))
	}
	if all || g.Observed.State != "" && g.Observed.State != "attached" {
		f.add("Observed", words(g.Observed.State, g.Observed.Detail))
	}
	f.add("Mounted at", g.MountPath)
	ends := a.ends(g)
	if g.Expires != nil {
		ends = stamp(*g.Expires) + " (" + ends + ")"
	}
	f.add("Ends", ends)
	if g.Renewed != nil {
		f.add("Renewed", stamp(*g.Renewed))
	}
	f.add("Uses", usesText(g))
	if g.Parent != nil {
		f.add("Derived from", fmt.Sprintf("%s (depth %d)", g.Parent, g.Depth))
	}
	f.add("Degraded", g.Degraded)
	if !all {
		return f
	}
	if g.Capability.Kind == (capabilities.FS{}).Name() && (g.State == api.GrantActive || g.State == api.GrantPending) {
		f.add("By hand", "mount -t virtiofs "+mountTag(g.ID)+" DIR (in the guest)")
	}
	f.add("Created", stamp(g.Created))
	if g.MaxDepth != nil {
		f.add("To be derived", fmt.Sprintf("%d deep", *g.MaxDepth))
	}
	for _, flag := range []struct {
		name string
		set  bool
	}{{"Persists", g.Persist}, {"Declared", g.Declared}, {"Narrowed", g.Narrowed}, {"No agent", g.NoAgent}} {
		if flag.set {
			f.add(flag.name, yesNo(true))
		}
	}
	if d := g.Decision; d != nil {
		f.add("Decision", orElse(d.Summary, string(d.Outcome)))
		for _, line := range verdictLines(*d) {
			f.add("", line)
		}
	}
	return f
}

// mountTag is the virtio-fs tag under which the guest finds a file grant.
func mountTag(grant uuid.UUID) string { return strings.ReplaceAll(grant.String(), "-", "") }

func holderText(g api.Grant) string {
	if g.HolderName == "" {
		return g.Holder.String()
	}
	return fmt.Sprintf("%s (%s)", g.HolderName, g.Holder)
}

// words are those that are not empty.
func words(all ...string) string {
	return strings.Join(slices.DeleteFunc(all, func(s string) bool { return s == "" }), " ")
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}
