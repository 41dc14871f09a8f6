package guestcli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// wholeSeconds is a lifetime as the broker takes it; zero is none.
func wholeSeconds(ttl time.Duration) (*int64, error) {
	if ttl < 0 || ttl%time.Second != 0 {
		return nil, fmt.Errorf("%w: --ttl is whole seconds", errUsage)
	}
	if ttl == 0 {
		return nil, nil
	}
	seconds := int64(ttl / time.Second)
	return &seconds, nil
}

// isID refuses what cannot be an id, and so must not become part of a path.
func isID(what, s string) error {
	if s == "" || strings.Trim(s, "0123456789abcdefABCDEF-") != "" {
		return fmt.Errorf("%w: %q is not the id of %s", errUsage, s, what)
	}
	return nil
}

func (c *cli) delegate() *cobra.Command {
	var (
		d           Delegation
		ttl         time.Duration
		uses, depth int
		tokenFile   string
	)
	cmd := &cobra.Command{
		Use:   "delegate {GRANT | --token-file FILE} --to VM",
		Short: "Pass a capability of this VM on to another VM",
		Long: `Pass a capability of this VM, or a part of it, on to another VM: one that
delegated something to this one ("list" shows it under FROM). It ends with the
capability that it derives from, and its uses are charged to that one too.

The broker answers when it is on record, and not when the other VM has it. It
does not tell a VM that is not there from one that must not be known, nor from
what policy refuses. "drop" with the new grant's id takes it back.

` + exitHelp,
		Example: `  spectrum-agent delegate 3f0c2f4e-6f38-4a53-9f43-3c1b8d8f0a11 --to 7d0a4b7e-1c55-4f0e-8d9c-2f6a1b3c4d5e
  spectrum-agent delegate --token-file photos.token --to 7d0a4b7e-1c55-4f0e-8d9c-2f6a1b3c4d5e \
    --narrow fs:ro:self:/photos/2024 --ttl 10m --max-uses 1`,
		Args: func(_ *cobra.Command, args []string) error {
			if (len(args) == 1) == (tokenFile != "") || len(args) > 1 {
				return fmt.Errorf("%w: give one grant, or --token-file", errUsage)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if d.To == "" {
				return fmt.Errorf("%w: delegate needs --to VM", errUsage)
			}
			if err := isID("a VM", d.To); err != nil {
				return err
			}
			var err error
			if d.Token, err = readToken(tokenFile); err != nil {
				return err
			}
			if len(args) == 1 {
				if d.Grant = args[0]; isID("a grant", d.Grant) != nil {
					return isID("a grant", d.Grant)
				}
			}
			if d.TTLSeconds, err = wholeSeconds(ttl); err != nil {
				return err
			}
			if cmd.Flags().Changed("max-uses") {
				d.MaxUses = &uses
			}
			if cmd.Flags().Changed("max-depth") {
				d.MaxDepth = &depth
			}
			return c.ask(cmd, func(ctx context.Context, client *Client) error {
				g, err := client.Delegate(ctx, d)
				if err != nil {
					return err
				}
				if c.output == "json" {
					return c.json(map[string]any{"grant": g})
				}
				return c.table([]Grant{g})
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&d.To, "to", "", "the UUID of the VM that is to have it")
	f.StringVar(&d.Capability, "narrow", "", "pass on only this capability; without it, all of it")
	f.DurationVar(&ttl, "ttl", 0, "for how long; without it, as long as this VM has it")
	f.IntVar(&uses, "max-uses", 0, "how many times it, with all that derives from it, may be used")
	f.IntVar(&depth, "max-depth", 0, "how many generations may be derived from it")
	f.StringVar(&d.Label, "label", "", "the name of its directory in the other VM")
	f.StringVar(&tokenFile, "token-file", "", "file with the token of the grant to pass on")
	return cmd
}

func (c *cli) token() *cobra.Command {
	var (
		file string
		show bool
	)
	cmd := &cobra.Command{
		Use:   "token GRANT {--token-file FILE | --token}",
		Short: "Fetch the token of a capability that this VM holds",
		Long: `Fetch the token of a capability that this VM holds, such as one that it was
delegated. It is a secret, of use to this VM alone.

` + exitHelp,
		Example: `  spectrum-agent token 3f0c2f4e-6f38-4a53-9f43-3c1b8d8f0a11 --token-file photos.token`,
		Args:    exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if (file != "") == show {
				return fmt.Errorf("%w: give one of --token-file and --token", errUsage)
			}
			if err := isID("a grant", args[0]); err != nil {
				return err
			}
			return c.ask(cmd, func(ctx context.Context, client *Client) error {
				token, err := client.Token(ctx, args[0])
				if err != nil {
					return err
				}
				if file != "" {
					return writeToken(file, token)
				}
				if c.output == "json" {
					return c.json(map[string]string{"grant": args[0], "token": token})
				}
				_, err = fmt.Fprintln(c.Out, token)
				return err
			})
		},
	}
	cmd.Flags().StringVar(&file, "token-file", "", "write the token to this new file, readable by its owner only")
	cmd.Flags().BoolVar(&show, "token", false, "print the token")
	return cmd
}
