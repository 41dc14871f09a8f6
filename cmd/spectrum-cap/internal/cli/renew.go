package cli

import (
	"io"

	"github.com/spf13/cobra"

	"spectrum-os.org/broker/broker/api"
)

func (a *app) renewCommand() *cobra.Command {
	var (
		ttl     string
		req     api.RenewRequest
		waiting waitFlags
	)
	cmd := &cobra.Command{
		Use:   "renew GRANT",
		Short: "Give a grant a later end, if policy still allows it",
		Long: `Give a grant a later end, counted from now, if policy still allows it. What the
guest has open stays open. It returns when what serves the grant in its VM knows
the new end.

Policy is asked as for a new grant. When it refuses, the grant ends when it was
to end. A renewal never ends a grant sooner, and never later than the grant that
it derives from; where that one, or policy, leaves less than was asked, it is
refused with exit code 8 unless --accept-narrower is given. What derives from
the grant keeps its own end, and a token keeps the one that is written in it:
fetch another.`,
		Example: `  spectrum-cap renew 5f3a9c01
  spectrum-cap renew 5f3a9c01 --ttl 2h
  spectrum-cap renew 5f3a9c01 --ttl 7d --accept-narrower`,
		Args:              args(1, 1, "a grant"),
		ValidArgsFunction: a.completeGrant,
		RunE: func(cmd *cobra.Command, got []string) error {
			seconds, err := parseTTL(ttl)
			if err != nil {
				return err
			}
			wait, timeout, err := waiting.read(cmd)
			if err != nil {
				return err
			}
			req.TTLSeconds, req.Wait, req.TimeoutSeconds = seconds, wait, timeout.Seconds()
			ctx, cancel := within(cmd.Context(), timeout)
			defer cancel()
			end := a.progress("waiting until the VM knows")
			g, err := a.broker().Renew(ctx, got[0], req)
			end()
			if err != nil {
				return err
			}
			return a.print(g, func(w io.Writer) { a.grantFacts(g, false).write(w) })
		},
	}
	f := cmd.Flags()
	f.StringVar(&ttl, "ttl", "", "end it this `duration` from now, such as 90s, 1h or 7d (default: as long as it was last given for)")
	f.BoolVar(&req.AcceptNarrower, "accept-narrower", false, "take what policy and the grant that it derives from leave of that")
	waiting.register(f, "when the VM knows")
	_ = cmd.RegisterFlagCompletionFunc("ttl", cobra.NoFileCompletions)
	return cmd
}
