package cli

import (
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"spectrum-os.org/broker/broker/api"
)

// limitFlags are those of what is counted.
type limitFlags struct{ uses, depth int }

func (l *limitFlags) register(f *pflag.FlagSet) {
	f.IntVar(&l.uses, "max-uses", 0, "how `many` times it, with all that derives from it, may be used: a use of files is one attachment to a run of its VM")
	f.IntVar(&l.depth, "max-depth", 0, "how `many` generations may be derived from it; 0: none")
}

// read sets what was given.
func (l *limitFlags) read(cmd *cobra.Command, req *api.GrantRequest) error {
	if cmd.Flags().Changed("max-uses") {
		if l.uses < 1 {
			return usage("--max-uses %d: it is not 1 or more", l.uses)
		}
		req.MaxUses = &l.uses
	}
	if cmd.Flags().Changed("max-depth") {
		if l.depth < 0 {
			return usage("--max-depth %d: it is not 0 or more", l.depth)
		}
		req.MaxDepth = &l.depth
	}
	return nil
}

func (a *app) delegateCommand() *cobra.Command {
	var (
		what       requestFlags
		limits     limitFlags
		waiting    waitFlags
		to, narrow string
		narrower   bool
		quiet      bool
	)
	cmd := &cobra.Command{
		Use:   "delegate GRANT --to VM",
		Short: "Pass a VM's grant on to another VM, or a part of it",
		Long: `Pass a VM's grant on to another VM, or a part of it. What is passed on is never
wider, and never lives longer, than the grant that it derives from: it ends with
that one. Its uses are charged to that one too.

Policy decides, with the grant that it derives from in its input: that of the
host, and of the partitions of both VMs and of the resource.`,
		Example: `  spectrum-cap delegate 5f3a9c01 --to work/web
  spectrum-cap delegate 5f3a9c01 --to work/web --narrow fs:ro:work:/invoices/2024 --ttl 1h
  spectrum-cap delegate 5f3a9c01 --to private/mail --max-uses 2 --max-depth 0 --persist`,
		Args:              args(1, 1, "a grant"),
		ValidArgsFunction: a.completeGrant,
		RunE: func(cmd *cobra.Command, got []string) error {
			if to == "" {
				return usage("delegate needs --to VM")
			}
			what.parent = got[0]
			req, err := what.request(to, narrow)
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
			end := a.progress("waiting until %s has it", to)
			g, err := a.broker().Grant(ctx, req)
			end()
			if err != nil {
				return err
			}
			return a.granted(g, quiet)
		},
	}
	f := cmd.Flags()
	f.StringVar(&to, "to", "", "the `VM` that is to have it")
	f.StringVar(&narrow, "narrow", "", "pass on only this `capability` (default: all of it)")
	what.registerLease(cmd)
	limits.register(f)
	waiting.register(f, "when the guest has it")
	f.BoolVar(&narrower, "accept-narrower", false, "take it even if policy, or the grant that it derives from, leaves less than was asked")
	f.BoolVarP(&quiet, "quiet", "q", false, "print the new grant's UUID only")
	_ = cmd.RegisterFlagCompletionFunc("to", a.completeVM)
	_ = cmd.RegisterFlagCompletionFunc("narrow", a.completeCapability)
	return cmd
}
