package cli

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"spectrum-os.org/broker/broker/api"
)

// completionWait is how long a person at the Tab key waits for the broker.
const completionWait = 2 * time.Second

func (a *app) completionCommand() *cobra.Command {
	cmd := group(&cobra.Command{
		Use:   "completion",
		Short: "Print the completion script for a shell",
		Long: `Print the completion script for a shell. It completes VMs, grants, partitions
and names by asking the broker.`,
		Example: `  source <(spectrum-cap completion bash)
  spectrum-cap completion zsh >"${fpath[1]}/_spectrum-cap"
  spectrum-cap completion fish >~/.config/fish/completions/spectrum-cap.fish`,
	})
	for _, shell := range []string{"bash", "zsh", "fish"} {
		cmd.AddCommand(&cobra.Command{
			Use:     shell,
			Short:   "Print the completion script for " + shell,
			Example: "  spectrum-cap completion " + shell,
			Args:    args(0, 0, ""),
			RunE: func(cmd *cobra.Command, _ []string) error {
				switch out := cmd.OutOrStdout(); shell {
				case "bash":
					return cmd.Root().GenBashCompletionV2(out, true)
				case "zsh":
					return cmd.Root().GenZshCompletion(out)
				default:
					return cmd.Root().GenFishCompletion(out, true)
				}
			},
		})
	}
	return cmd
}

// complete offers what list finds, if this argument takes one at all. Without
// a broker there is nothing to offer, and nothing to say.
func (a *app) complete(cmd *cobra.Command, takes bool, list func(context.Context) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	if !takes {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	parent := cmd.Context()
	if parent == nil {
		parent = context.Background()
	}
	ctx, cancel := context.WithTimeout(parent, completionWait)
	defer cancel()
	words, err := list(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	for i := range words {
		words[i] = plain(strings.ReplaceAll(words[i], "\n", " "))
		words[i] = strings.Replace(words[i], `\u0009`, "\t", 1) // between a word and its description
	}
	return words, cobra.ShellCompDirectiveNoFileComp
}

func (a *app) vmWords(ctx context.Context) ([]string, error) {
	vms, err := a.broker().ListVMs(ctx)
	var words []string
	for _, v := range vms {
		words = append(words, v.Name+"\t"+string(v.State))
	}
	return words, err
}

func (a *app) completeVM(cmd *cobra.Command, got []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd, len(got) == 0 || cmd.ValidArgsFunction == nil || takesNoVM(cmd), a.vmWords)
}

// takesNoVM tells commands whose arguments are no VMs, so that completion of
// one is that of a flag.
func takesNoVM(cmd *cobra.Command) bool { return cmd.Name() == "revoke" || cmd.Name() == "delegate" }

func (a *app) completeVMs(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd, true, a.vmWords)
}

func (a *app) grantWords(taken []string) func(context.Context) ([]string, error) {
	return func(ctx context.Context) ([]string, error) {
		grants, err := a.broker().ListGrants(ctx, api.GrantFilter{})
		short := a.short(grantIDs(grants))
		var words []string
		for _, g := range grants {
			if id := short(g.ID); !slices.Contains(taken, id) {
				words = append(words, id+"\t"+orElse(g.HolderName, g.Holder.String())+" "+orElse(g.Spoken, g.Spelling))
			}
		}
		return words, err
	}
}

func (a *app) completeGrant(cmd *cobra.Command, got []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd, len(got) == 0 || cmd.Name() == "grant" || cmd.Name() == "explain", a.grantWords(nil))
}

func (a *app) completeGrants(cmd *cobra.Command, got []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd, true, a.grantWords(got))
}

func (a *app) completePartition(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd, true, func(ctx context.Context) ([]string, error) {
		partitions, err := a.broker().ListPartitions(ctx)
		var words []string
		for _, p := range partitions {
			words = append(words, orElse(p.Name, p.ID.String()))
		}
		return words, err
	})
}

func (a *app) completeRequest(cmd *cobra.Command, got []string, word string) ([]string, cobra.ShellCompDirective) {
	switch len(got) {
	case 0:
		return a.completeVM(cmd, got, word)
	case 1:
		return a.completeCapability(cmd, got, word)
	}
	return nil, cobra.ShellCompDirectiveNoFileComp
}

// completeCapability offers the beginning of a spelling up to its path, which
// is for the person to write.
func (a *app) completeCapability(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	words, directive := a.complete(cmd, true, func(ctx context.Context) ([]string, error) {
		partitions, err := a.broker().ListPartitions(ctx)
		var words []string
		for _, mode := range []string{"ro", "rw"} {
			for _, p := range partitions {
				words = append(words, "fs:"+mode+":"+orElse(p.Name, p.ID.String())+":/")
			}
		}
		return words, err
	})
	return words, directive | cobra.ShellCompDirectiveNoSpace
}
