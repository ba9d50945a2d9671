; inherits: c_family
(parameter_list (identifier) @var)
(declaration declarator: (function_declarator (identifier) @fixed))
(struct_specifier name: (type_identifier) @keep)
(union_specifier name: (type_identifier) @keep)
(enum_specifier name: (type_identifier) @keep)
