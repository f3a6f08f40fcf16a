/* SPDX-License-Identifier: Apache-2.0
 *
 * The guest's parser of policies on its own: a policy on standard input; what was read of it, strings in
 * hexadecimal, on standard output; or status 1 and the reason.
 */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "policy.h"

static void hex(const char *text)
{
    for (printf(" "); *text; text++)
        printf("%02x", (unsigned char)*text);
}

static void list(const char *name, char *const *strings)
{
    printf("%s", name);
    for (; *strings; strings++)
        hex(*strings);
    printf("\n");
}

int main(void)
{
    static char text[POLICY_BYTES_MAX + 2];
    static struct policy policy;
    size_t size = fread(text, 1, POLICY_BYTES_MAX, stdin);
    uint8_t digest[DIGEST_BYTES];
    sha256(text, size, digest);
    printf("sha256 ");
    for (size_t i = 0; i < DIGEST_BYTES; i++)
        printf("%02x", digest[i]);
    printf("\n");
    const char *wrong = policy_parse(text, size, &policy);
    if (wrong) {
        printf("%s\n", wrong);
        return 1;
    }
    if (policy.disk[0])
        printf("disk %s\n", policy.disk);
    for (size_t i = 0; i < policy.layer_count; i++) {
        const struct layer *layer = &policy.layers[i];
        printf("layer %s %s %s %llu %u %u\n", layer->name, layer->format->name, layer->root_hash_hex,
               (unsigned long long)layer->data_size, layer->format->data_block, layer->format->hash_block);
    }
    list("args", policy.args);
    list("env", policy.env);
    printf("cwd");
    hex(policy.cwd);
    printf("\nuser");
    hex(policy.user);
    printf("\n");
    return 0;
}
